"""An auto-encoder of one task's image features, whose reconstruction error tells how familiar an image is.

Legend: n images, p width of CLIP's projection.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

#: Its training: steps, batch size, learning rate and weight decay; every HELD_OUT-th image is held out.
STEPS, BATCH, RATE, DECAY, HELD_OUT = 300, 64, 0.01, 1e-4, 5


class AutoEncoder(nn.Module):
    """Auto-encoder p → code → p of unit vectors, which are scaled to entries of about 1.

    Args:
        width: p.
        code: width of the bottleneck.
    """

    def __init__(self, width: int, code: int):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, code), nn.Linear(code, width)
        #: The mean error on the task's held-out images.
        self.register_buffer("usual", torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        """Reconstruct scaled features (n, p)."""
        return self.decoder(self.encoder(image).relu())

    def error(self, image: Tensor) -> Tensor:
        """Return the mean squared error (n,) of each image's features (n, p)."""
        scaled = image * image.shape[1] ** 0.5
        return (self(scaled) - scaled).square().mean(dim=1)

    @classmethod
    def read(cls, state: Mapping[str, Tensor]) -> AutoEncoder:
        """Return the auto-encoder with the tensors of a `state_dict`, frozen."""
        coder = cls(*reversed(state["encoder.weight"].shape))
        coder.load_state_dict(state)
        return coder.requires_grad_(False)

    @classmethod
    def trained(cls, image: Tensor, code: int, seed: int) -> AutoEncoder:
        """Train an auto-encoder; equal arguments give the same one in every process.

        Args:
            image: unit-length features (n, p).
            code: width of the bottleneck.
            seed: seed of its initialisation and its batches.
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
        # With fewer than HELD_OUT images, the error on the training images; above 0, because others are
        # divided by it.
        usual = coder.error(image[held_out] if held_out.any() else image).mean()
        coder.usual.copy_(usual.clamp_min(torch.finfo(image.dtype).tiny))
        return coder
