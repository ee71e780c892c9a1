"""Parts of a task and the ordinary way to the same work: training step, gradient pass, feature pass.

Each function returns (name, plain, ours, note), where `plain` and `ours` do the work once, in the ordinary
way and in this project's; bench.py times them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from llava_keeplora.adapters import AdapterInit, attach
from llava_keeplora.capture import feature_pass, gradient_pass
from llava_keeplora.config import ModelConfig
from llava_keeplora.models import Family, load_model
from llava_keeplora.sequence.data import ImageCache
from llava_keeplora.subspace import DenseGradient, SecondMoment
from llava_keeplora_recipes import TaskData, load_recipe, load_split

Pair = tuple[str, Callable[[], object], Callable[[], object], str]

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
TASK, BATCH, BATCHES, RANK = "shapes", 64, 4, 16


class Setting:
    """The embedded CLIP on one rendered task, with a few batches in memory."""

    def __init__(self):
        self.family = load_model(ModelConfig())
        self.data = load_split(load_recipe(TASK), "test")
        self.task = self.family.task(self.data.recipe)
        inputs = self.family.inputs(
            self.data, ImageCache(self.family.prepare, budget_gb=1.0).split(self.data)
        )
        self.batches = [
            inputs.collate(range(start, start + BATCH)) for start in range(0, BATCH * BATCHES, BATCH)
        ]
        self.layers = {
            n: m for part in self.family.parts for n, m in self.family.linear_layers(part, TARGETS).items()
        }
        self.parts = {n: "text" if n.startswith("text") else "vision" for n in self.layers}


def training_step() -> Pair:
    """Compare a KeepLoRA step (A frozen) with a PEFT LoRA step of equal rank."""
    setting = Setting()
    plain, ours = (
        adapter_steps(load_model(ModelConfig()), setting.data, setting.layers, setting.batches, train_A)
        for train_A in (True, False)
    )
    return (
        "KeepLoRA step / PEFT LoRA step",
        plain,
        ours,
        f"rank {RANK}, q/k/v/out of both encoders, batch {BATCH}",
    )


def adapter_steps(
    family: Family,
    data: TaskData,
    layers: Iterable[str],
    batches: Iterable[Mapping[str, torch.Tensor]],
    train_A: bool,
) -> Callable[[], None]:
    """Return a function that makes one optimiser step per batch, with adapters on the named layers."""
    task = family.task(data.recipe)
    attach(family.model, {name: AdapterInit(RANK, RANK, train_A=train_A) for name in layers})
    optimiser = torch.optim.AdamW([p for p in family.model.parameters() if p.requires_grad], lr=1e-3)

    def run() -> None:
        for batch in batches:
            optimiser.zero_grad()
            task(**batch)["loss"].backward()
            optimiser.step()

    return run


def dense_gradient_pass() -> Pair:
    """Compare the dense gradient pass with the same forward and backward pass of frozen weights."""
    setting = Setting()

    def plain() -> None:
        # For a fair comparison the gradient must flow through every layer, so both encoders' first inputs
        # require one.
        def ask(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            return output.requires_grad_(True)

        clip = setting.family.model
        handles = [
            m.register_forward_hook(ask) for m in (clip.vision_model.pre_layrnorm, clip.text_model.embeddings)
        ]
        with setting.task.constants() as constants:
            for batch in setting.batches:
                setting.task(**batch)["loss"].backward()
            for output, cotangent in constants:
                output.backward(cotangent)
        for handle in handles:
            handle.remove()

    def ours() -> None:
        dense = {
            n: DenseGradient(layer.out_features, layer.in_features) for n, layer in setting.layers.items()
        }
        gradient_pass(
            setting.task, setting.layers, [(batch, True) for batch in setting.batches], BATCH * BATCHES, dense
        )

    return (
        "gradient pass / forward and backward of frozen weights",
        plain,
        ours,
        f"dense, {len(setting.layers)} layers",
    )


def second_moment_pass() -> Pair:
    """Compare the feature pass (exact second moments) with a forward pass."""
    setting = Setting()

    def plain() -> None:
        with torch.no_grad(), setting.task.constants():
            for batch in setting.batches:
                setting.task(**batch)

    def ours() -> None:
        def moments(groups):
            return {
                n: m
                for names in groups
                for m in [SecondMoment(setting.layers[names[0]].in_features)]
                for n in names
            }

        feature_pass(
            setting.task, setting.layers, setting.parts, [(batch, True) for batch in setting.batches], moments
        )

    return "feature pass / forward", plain, ours, "q, k and v share one second moment"


PAIRS = {"step": training_step, "gradient": dense_gradient_pass, "features": second_moment_pass}
