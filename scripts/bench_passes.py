"""The parts of a task against the plain way: training step, gradient pass, feature pass; used by bench.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from llava_keeplora.adapters import AdapterInit, attach
from llava_keeplora.capture import feature_pass, gradient_pass
from llava_keeplora.config import ModelConfig
from llava_keeplora.models import load_model
from llava_keeplora.subspace import SecondMoment
from llava_keeplora_recipes import load_recipe

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
TASK, BATCH, BATCHES, RANK = "shapes", 64, 4, 16


def medians(plain: Callable[[], object], ours: Callable[[], object], repeats: int = 9) -> tuple[float, float]:
    """Median seconds of both, taken in turns after a warm-up so that a change of load meets both alike."""
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for run in (plain, ours):
        run(), run()
    for _ in range(repeats):
        for name, run in (("plain", plain), ("ours", ours)):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return statistics.median(times["plain"]), statistics.median(times["ours"])


class Setting:
    """The embedded CLIP on one rendered task, with a few batches in memory."""

    def __init__(self):
        self.family = load_model(ModelConfig())
        data = load_recipe(TASK).load("test")
        self.task = self.family.task(data.recipe)
        images = [data[i].image for i in range(BATCH * BATCHES)]
        pixels, labels = self.family.pixels(images), torch.tensor(data.labels[: BATCH * BATCHES])
        self.batches = [{"pixel_values": p, "labels": y} for p, y in zip(pixels.split(BATCH), labels.split(BATCH))]
        self.layers = {n: m for part in self.family.parts for n, m in self.family.linear_layers(part, TARGETS).items()}
        self.parts = {n: "text" if n.startswith("text") else "vision" for n in self.layers}


def training_step() -> list[tuple[str, float, float, str]]:
    """A KeepLoRA step (A frozen) against a PEFT LoRA step of equal rank."""
    setting = Setting()

    def steps(train_A: bool) -> Callable[[], None]:
        family = load_model(ModelConfig())
        task = family.task(load_recipe(TASK).load("test").recipe)
        attach(family.model, {name: AdapterInit(RANK, RANK, train_A=train_A) for name in setting.layers})
        optimiser = torch.optim.AdamW([p for p in family.model.parameters() if p.requires_grad], lr=1e-3)

        def run() -> None:
            for batch in setting.batches:
                optimiser.zero_grad()
                task(**batch)["loss"].backward()
                optimiser.step()

        return run

    return [("KeepLoRA step / PEFT LoRA step", *medians(steps(True), steps(False)), f"rank {RANK}, q/k/v/out of both encoders, batch {BATCH}")]


def dense_gradient_pass() -> list[tuple[str, float, float, str]]:
    """The dense gradient pass against the same forward and backward with frozen weights."""
    setting = Setting()

    def plain() -> None:
        # The gradient has to flow through every layer for the comparison, so both encoders' first inputs ask for one.
        def ask(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            return output.requires_grad_(True)

        clip = setting.family.model
        handles = [m.register_forward_hook(ask) for m in (clip.vision_model.pre_layrnorm, clip.text_model.embeddings)]
        with setting.task.constants():
            for batch in setting.batches:
                setting.task(**batch)["loss"].backward()
        for handle in handles:
            handle.remove()

    def ours() -> None:
        gradient_pass(setting.task, setting.layers, setting.batches, BATCH * BATCHES)

    return [("gradient pass / forward and backward", *medians(plain, ours), f"dense, {len(setting.layers)} layers")]


def second_moment_pass() -> list[tuple[str, float, float, str]]:
    """The feature pass (exact second moments) against a plain forward pass."""
    setting = Setting()

    def plain() -> None:
        with torch.no_grad(), setting.task.constants():
            for batch in setting.batches:
                setting.task(**batch)

    def ours() -> None:
        feature_pass(setting.task, setting.layers, setting.parts, setting.batches, SecondMoment)

    return [("feature pass / forward", *medians(plain, ours), "q, k and v share one second moment")]
