"""An image encoder of Qwen2.5-VL's kind first learns to see what a CLIP's sees, patch by patch.

Its layers have no counterpart for CLIP's learned positions, so that weights can't be copied.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pretraining.images import SIDE, augment
from pretraining.lessons import Lessons
from torch import nn
from transformers import CLIPModel, Qwen2_5_VLForConditionalGeneration

STEPS, BATCH, LR = 800, 96, 1e-3


def merged_order(rows: int, merge: int) -> torch.Tensor:
    """Return the row-major numbers of a square grid's patches in the order of Qwen's image processor."""
    numbers = torch.arange(rows * rows).reshape(rows // merge, merge, rows // merge, merge)
    return numbers.transpose(1, 2).flatten()


class Distillation:
    """Trains the image encoder of a Qwen-VL, in place, towards a CLIP's patches before its last layer."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, clip: Path, steps: int = STEPS) -> None:
        self.visual = model.model.visual
        config = self.visual.config
        self.teacher = CLIPModel.from_pretrained(clip).vision_model.eval()
        self.patches = SIDE // config.patch_size
        self.order = merged_order(self.patches, config.spatial_merge_size)
        # Maps the encoder's width to the CLIP's, and is thrown away afterwards.
        self.head = nn.Linear(config.hidden_size, self.teacher.config.hidden_size)
        self.optimiser = torch.optim.AdamW(
            [*self.visual.parameters(), *self.head.parameters()],
            betas=(0.9, 0.98),
            weight_decay=0.05,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, LR, total_steps=steps, pct_start=0.06, cycle_momentum=False
        )

    def seen_by_clip(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return a CLIP's features in Qwen's order: images x patches x width, mean 0, variance 1."""
        with torch.no_grad():
            states = self.teacher(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        return F.layer_norm(states[:, 1:][:, self.order], states.shape[-1:])

    def learn(self, pixels: torch.Tensor, cut: torch.Tensor, bf16: bool) -> float:
        """Train one step and return the mean squared error, which is 1 for a constant answer.

        Args:
            pixels: images as the CLIP takes them.
            cut: the same as the encoder's patches.
            bf16: whether to compute in bfloat16.
        """
        target = self.seen_by_clip(pixels)
        grids = torch.tensor([[1, self.patches, self.patches]]).expand(len(pixels), -1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            states = self.visual(cut, grid_thw=grids).last_hidden_state
            made = self.head(states).float().view_as(target)
        loss = F.mse_loss(made, target)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        return loss.item()


def distil(
    model: Qwen2_5_VLForConditionalGeneration,
    lessons: Lessons,
    patches: Callable[[torch.Tensor], torch.Tensor],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Teach the encoder, or take what `--work` holds of it, and return a record of how.

    Args:
        model: a Qwen-VL.
        lessons: with all images, each of which is shown equally often.
        patches: cuts images as the encoder takes them.
        args: the arguments of the script.
    """
    saved = args.work / "encoder.pt" if args.work else None
    if saved and saved.exists():
        model.model.visual.load_state_dict(torch.load(saved, weights_only=True))
    else:
        teaching, started = Distillation(model, args.clip), time.time()
        for step in range(STEPS):
            torch.manual_seed(args.seed * 1_000_003 + step)
            rows = torch.randint(len(lessons.pixels), (BATCH,))
            seen = augment(lessons.pixels[rows], lessons.mirrored[rows], lessons.moved[rows])
            loss = teaching.learn(seen, patches(seen), args.bf16)
            if step % 20 == 0:
                gone = time.time() - started
                print(f"encoder: step {step}/{STEPS}  error {loss:.3f}  {gone:.0f}s gone", flush=True)
        if saved:
            saved.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.model.visual.state_dict(), saved)
    weights = (args.clip / "model.safetensors").read_bytes()
    recipe = {"steps": STEPS, "batch": BATCH, "lr": LR}
    return {"distilled_from": args.clip.name, "sha256": hashlib.sha256(weights).hexdigest(), **recipe}
