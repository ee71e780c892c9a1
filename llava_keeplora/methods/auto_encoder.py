"""An auto-encoder that knows one task's pictures by how well it gives their features back.

Legend: n pictures, p width of CLIP's projection.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

#: Its training, and one of how many pictures is held out of it.
STEPS, BATCH, RATE, DECAY, HELD_OUT = 300, 64, 0.01, 1e-4, 5


class AutoEncoder(nn.Module):
    """p → code → p, for unit vectors; they are scaled to entries of about 1.

    Args:
        width: p.
        code: of the bottleneck.
    """

    def __init__(self, width: int, code: int):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, code), nn.Linear(code, width)
        #: The mean error on pictures of its task that it was not trained on.
        self.register_buffer("usual", torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        """(n, p) → (n, p)."""
        return self.decoder(self.encoder(image).relu())

    def error(self, image: Tensor) -> Tensor:
        """(n,) mean squared error of each picture's features (n, p)."""
        scaled = image * image.shape[1] ** 0.5
        return (self(scaled) - scaled).square().mean(dim=1)

    @classmethod
    def read(cls, state: Mapping[str, Tensor]) -> AutoEncoder:
        """One from its tensors."""
        coder = cls(*reversed(state["encoder.weight"].shape))
        coder.load_state_dict(state)
        return coder.requires_grad_(False)

    @classmethod
    def trained(cls, image: Tensor, code: int, seed: int) -> AutoEncoder:
        """One trained on features (n, p), the same in every process that has the same.

        Args:
            image: the features.
            code: of the bottleneck.
            seed: of its start and its batches.
        """
        held_out = torch.arange(len(image)) % HELD_OUT == HELD_OUT - 1
        scaled = image[~held_out] * image.shape[1] ** 0.5
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            coder = cls(image.shape[1], code)
            optimizer = torch.optim.Adam(coder.parameters(), RATE, weight_decay=DECAY)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            for _ in range(STEPS):
                batch = scaled[torch.randint(len(scaled), (BATCH,))]
                optimizer.zero_grad()
                mse_loss(coder(batch), batch).backward()
                optimizer.step()
                schedule.step()
        coder.requires_grad_(False)
        # With too few pictures to hold one out, by those that there are; and never by nothing.
        usual = coder.error(image[held_out] if held_out.any() else image).mean()
        coder.usual.copy_(usual.clamp_min(torch.finfo(image.dtype).tiny))
        return coder
