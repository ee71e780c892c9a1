"""Train a model that answers questions about images; a killed run resumes from its last checkpoint."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pretraining.images import versions
from pretraining.lessons import SHARES, Lessons
from pretraining.turns import TaughtSet
from pretraining.zero_shot import evaluate
from transformers import PreTrainedModel


def answer_losses(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], bf16: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token of an answer: its cross-entropy, and whether it is predicted right."""
    inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"][:, 1:]
    said = labels != -100
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[said]).float()
    return F.cross_entropy(logits, labels[said], reduction="none"), logits.argmax(-1) == labels[said]


class Training:
    """A model with its optimiser and schedule, and how far they are.

    Can be written down and taken up again.
    """

    def __init__(self, model: PreTrainedModel, args: argparse.Namespace) -> None:
        self.model, self.bf16 = model, args.bf16
        self.step, self.seconds = 0, 0.0
        decay = [p for p in model.parameters() if p.ndim > 1]
        without_decay = [p for p in model.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.05}, {"params": without_decay, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, args.lr, total_steps=args.steps, pct_start=0.06, cycle_momentum=False
        )

    def learn(self, parts: list[dict[str, torch.Tensor]]) -> np.ndarray:
        """Train one step and return the loss per token and the share of tokens predicted right."""
        count = sum(int((part["labels"] != -100).sum()) for part in parts)
        total = np.zeros(2)
        self.optimiser.zero_grad()
        for part in parts:
            losses, right = answer_losses(self.model, part, self.bf16)
            (losses.sum() / count).backward()
            total += losses.sum().item(), right.sum().item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.step += 1
        return total / count

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimiser", "schedule")}
        torch.save(state | {"step": self.step, "seconds": self.seconds}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name in ("model", "optimiser", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]


def train(model: PreTrainedModel, lessons: Lessons, args: argparse.Namespace) -> float:
    """Train in place, taking up what `--work` holds; returns the seconds that the steps took."""
    run = Training(model.train(), args)
    saved = args.work / "checkpoint.pt" if args.work else None
    if saved and saved.exists():
        run.load(saved)
    started, written, running = time.time() - run.seconds, time.time(), None
    while run.step < args.steps:
        now = run.learn(list(lessons(run.step)))
        running = now if running is None else 0.95 * running + 0.05 * now
        run.seconds = time.time() - started
        if run.step % 20 == 0 or run.step == args.steps:
            left = run.seconds / run.step * (args.steps - run.step)
            print(
                f"step {run.step}/{args.steps}  loss {running[0]:.3f}  tokens right {running[1]:.3f}  "
                f"{run.seconds:.0f}s gone, {left:.0f}s to go",
                flush=True,
            )
        if saved and (time.time() - written > 180 or run.step == args.steps):
            run.save(saved)
            written = time.time()
    model.eval()
    return run.seconds


def make_record(
    args: argparse.Namespace, sets: list[TaughtSet], model: PreTrainedModel, seconds: float
) -> dict[str, Any]:
    """Return what decided a saved model's weights, and what it scores."""
    return {
        "recipe": {k: getattr(args, k) for k in ("steps", "batch", "lr", "vocabulary", "seed", "bf16")},
        "shares": SHARES,
        "pretrain_sets": {
            s.name: {"images": len(s.turns), "turns": sum(map(len, s.turns)), "sha256": s.fingerprint()}
            for s in sets
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "zero_shot_test": evaluate(args.out, args.data_root),
    }
