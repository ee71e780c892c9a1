"""Streamed passes (sketches) against the ordinary way, on a random LLaVA with wide layers.

The ordinary gradient pass is the same forward and backward pass of frozen weights, with the gradient flowing
through every adapted layer. Memory is counted tensor by tensor: the most bytes alive at once, whatever made
them.

Pairs are as in bench_passes.py; each can be built with a smaller model.
"""

from __future__ import annotations

import math
import statistics as numbers
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from unittest import mock

import torch
from bench_passes import RANK, Pair
from random_llava import Size, language_layers, random_batch, random_llava
from torch import Tensor

from llava_keeplora.adapters import AdapterInit, attach, detach
from llava_keeplora.capture import feature_pass, gradient_pass
from llava_keeplora.config import ModelConfig
from llava_keeplora.methods import Layer, TaskContext
from llava_keeplora.methods.gradient_init import first_step_directions, gradient_statistic
from llava_keeplora.methods.presets import PaperRules
from llava_keeplora.models import load_model
from llava_keeplora.models.llava import LlavaTask
from llava_keeplora.plan.allocation_tracker import Meter
from llava_keeplora.sequence.data import ImageCache
from llava_keeplora.subspace import (
    DenseGradient,
    GradientSketch,
    ResidualDirections,
    gradient_sketch,
    principal_basis,
    residual,
    sketch_width,
)
from llava_keeplora_recipes import load_recipe, load_split

WIDE = Size(
    hidden=1024,
    intermediate=2752,
    layers=8,
    heads=8,
    vocabulary=8192,
    vision_hidden=256,
    vision_intermediate=1024,
    vision_layers=4,
    vision_heads=4,
    image=112,
)
# An example is 64 image tokens, 160 of a question and 32 of an answer.
EXAMPLES, TEXT, ANSWER = 4, 192, 32
ENERGY = 0.6
# Memory of the bounded feature pass, as a share of the adapted weights' size.
FEATURE_SHARE = 0.15
# A feature pass finds once which layers share an input; with several batches this takes little of its time.
BATCHES = 4


class Setting:
    """The wide LLaVA, its adapted layers with their principal bases, and one batch."""

    def __init__(self, quick: bool) -> None:
        self.size = replace(WIDE, layers=1) if quick else WIDE
        self.model = random_llava(self.size)
        self.task = LlavaTask(self.model)
        self.layers = language_layers(self.model)
        self.weight_bytes = sum(layer.weight.nbytes for layer in self.layers.values())
        self.batch = random_batch(self.size, EXAMPLES, TEXT, ANSWER)
        self.described = {
            name: Layer(name, "language", layer, RANK, float(RANK), ENERGY, 0.99)
            for name, layer in self.layers.items()
        }

    @property
    def shape(self) -> str:
        """Description of the model and the batch."""
        size = self.size
        tokens = size.image_tokens + TEXT
        layers = f"{size.layers} layers x {size.hidden} ({size.intermediate})"
        return f"{layers}, {EXAMPLES} x {tokens} tokens, rank {RANK}"

    @cached_property
    def bases(self) -> dict[str, Tensor]:
        """Principal bases of the weights, by layer."""
        return {name: principal_basis(layer.weight, ENERGY).basis for name, layer in self.layers.items()}

    def plain_step(self) -> None:
        """Run a forward and backward pass that reaches all layers, as the embedding requires a gradient."""
        handle = self.model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.requires_grad_(True)
        )
        self.task(**self.batch)["loss"].backward()
        handle.remove()

    def statistics(self, sketched: bool) -> dict[str, DenseGradient | GradientSketch]:
        """Return the statistics that the library chooses for the layers' gradients."""
        width = sketch_width(RANK) if sketched else None
        return {
            name: gradient_statistic(layer, self.bases[name], width, 0)
            for name, layer in self.described.items()
        }

    def gradient_step(self, statistics: Mapping[str, object]) -> None:
        """Run a gradient pass over the batch."""
        gradient_pass(self.task, self.layers, [(self.batch, True)], self.task.weight(self.batch), statistics)

    def peak(self, run: Callable[[], object]) -> int:
        """Return the most bytes alive while a function runs, beyond the model, the batch and the bases."""
        with Meter() as meter:
            meter.hold(
                [*self.model.parameters(), *self.model.buffers(), *self.batch.values(), *self.bases.values()]
            )
            before = meter.peak = meter.live
            run()
        return meter.peak - before

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Recompute activations in the backward pass for the length of a block."""
        self.model.train()
        self.task.activation_checkpointing_enable()
        yield
        self.task.activation_checkpointing_disable()
        self.model.eval()

    def lora_peak(self) -> int:
        """Return the most bytes alive in a LoRA step without optimiser, model, batch and adapters."""
        wrapper = attach(self.model, {name: AdapterInit(RANK, RANK, train_A=True) for name in self.layers})
        try:
            return self.peak(lambda: self.task(**self.batch)["loss"].backward())
        finally:
            detach(wrapper)

    def beyond(self, work: Callable[[], object]) -> str:
        """Return peak memory beyond a LoRA step and a frozen step, as shares of the adapted weights' size."""

        def shares() -> str:
            ours = self.peak(work)
            floors = (self.lora_peak(), self.peak(self.plain_step))
            return " and ".join(f"{100 * (ours - floor) / self.weight_bytes:.1f} %" for floor in floors)

        without_checkpoints = shares()
        with self.checkpointed():
            return (
                f"peak beyond a LoRA step and frozen weights {without_checkpoints} of the adapted weights; "
                f"activations checkpointed {shares()}"
            )


def gradient(sketched: bool, quick: bool) -> Pair:
    """Compare the gradient pass with the same forward and backward pass of frozen weights."""
    setting = Setting(quick)
    statistics = setting.statistics(sketched)
    tensors = [tensor for statistic in statistics.values() for tensor in _tensors(statistic)]
    size = sum(tensor.nbytes for tensor in tensors) / setting.weight_bytes
    beyond = setting.beyond(lambda: setting.gradient_step(setting.statistics(sketched)))
    note = f"{setting.shape}; {beyond}; statistics alone {100 * size:.1f} %"
    # The buffers are allocated once a task, not once a batch.
    form = "sketch" if sketched else "dense"
    return (
        f"gradient pass, {form} / forward and backward of frozen weights",
        setting.plain_step,
        lambda: setting.gradient_step(statistics),
        note,
    )


def _tensors(statistic: DenseGradient | GradientSketch) -> list[Tensor]:
    return (
        [*statistic.tensors, statistic._omega] if isinstance(statistic, GradientSketch) else statistic.tensors
    )


def second_pass(quick: bool) -> Pair:
    """Time the pass for the exact Q^T G, which layers need that one pass doesn't settle; here all of them."""
    setting = Setting(quick)
    first = setting.statistics(sketched=True)
    setting.gradient_step(first)
    second = {name: statistic.second_pass() for name, statistic in first.items()}
    name = "second gradient pass / forward and backward of frozen weights"
    return name, setting.plain_step, lambda: setting.gradient_step(second), setting.shape


def bounded_features(quick: bool) -> Pair:
    """Compare the feature pass with bounded memory with a forward pass."""
    setting = Setting(quick)
    parts = dict.fromkeys(setting.layers, "language")
    budget = int(FEATURE_SHARE * setting.weight_bytes)
    sketches: dict[str, object] = {}

    def plain() -> None:
        with torch.no_grad():
            setting.task(**setting.batch)

    def statistics(groups: list[list[str]]) -> dict[str, object]:
        if not sketches:
            sketches.update(
                PaperRules.statistics(
                    [[setting.described[name] for name in names] for names in groups],
                    setting.bases,
                    budget,
                    0,
                )
            )
        return sketches

    def ours() -> None:
        feature_pass(setting.task, setting.layers, parts, [(setting.batch, True)] * BATCHES, statistics)

    ours()
    sizes = sorted({sketch.test.shape[1] for sketch in sketches.values()})
    share = f"{100 * FEATURE_SHARE:.0f} % of the adapted weights' size"
    note = f"{setting.shape}; sketches of {sizes[0]} to {sizes[-1]} directions in {share}"
    return "feature pass, bounded / forward", lambda: [plain() for _ in range(BATCHES)], ours, note


class Embedded:
    """An embedded model on a rendered task, with its demo's adapted layers and principal bases."""

    def __init__(
        self, model: str, recipe: str, rank: int, examples: int, batch: int = 32, energy: float = 0.85
    ):
        family = load_model(ModelConfig(model))
        data = load_split(load_recipe(recipe), "train").take(range(examples))
        inputs = family.inputs(data, ImageCache(family.prepare, budget_gb=1.0).split(data))
        self.task, self.name = family.task(data.recipe), f"{model}, {recipe}"
        self.batches = [
            (inputs.collate(range(start, min(start + batch, examples))), True)
            for start in range(0, examples, batch)
        ]
        self.total = sum(self.task.weight(inputs) for inputs, _ in self.batches)
        self.layers = {
            name: Layer(name, part, module, rank, float(rank), energy, 0.95)
            for part in family.parts
            for name, module in family.linear_layers(part, family.targets[part]).items()
        }
        self.modules = {name: layer.module for name, layer in self.layers.items()}
        self.bases = {
            name: principal_basis(module.weight, energy).basis for name, module in self.modules.items()
        }
        self.ranks = {
            name: min(rank, module.in_features - self.bases[name].shape[1])
            for name, module in self.modules.items()
        }

    def directions(self, sketched: bool) -> dict[str, ResidualDirections]:
        """Return A of every layer, by as many passes as it takes.

        Sketches are used even if the gradient itself would be smaller.
        """

        def gradients(fraction, given):
            return gradient_pass(self.task, self.modules, self.batches, self.total, given)

        ctx = TaskContext(1, "task", self.layers, gradients, lambda *_: {}, seed=0, statistics_bytes=0)
        with mock.patch.object(gradient_sketch, "WORTH", math.inf):
            return first_step_directions(
                ctx, self.ranks, self.bases, 1.0, sketched, PaperRules.directions, lambda layer: nullcontext()
            )[0]

    def shares(self, directions: Mapping[str, ResidualDirections]) -> list[float]:
        """Return the share of the best r directions' energy that each A has, in float64."""
        dense = {
            name: DenseGradient(module.out_features, module.in_features)
            for name, module in self.modules.items()
        }
        gradient_pass(self.task, self.modules, self.batches, self.total, dense)
        shares = []
        for name, result in directions.items():
            outside = residual(dense[name].matrix.double(), self.bases[name].double())
            best = torch.linalg.svdvals(outside).square()[: result.A.shape[1]].sum()
            shares.append(float((outside @ result.A.double()).square().sum() / best))
        return shares


def captured(model: str, recipe: str, rank: int, quick: bool) -> Pair:
    """Compare A from sketches, with as many passes as they need, with A from the dense gradient.

    The note has the share of the best directions' energy in A.
    """
    setting = Embedded(model, recipe, rank, examples=32 if quick else 256)
    directions = setting.directions(sketched=True)
    shares = setting.shares(directions)
    passes = Counter(result.passes for result in directions.values())
    counts = ", ".join(f"{count} in {number}" for number, count in sorted(passes.items()))
    quality = f"share of the optimum {min(shares):.4f} at least, {numbers.median(shares):.4f} in the median"
    note = f"rank {rank}; {quality}; of {len(directions)} layers {counts} passes"
    name = f"A from sketches / from dense gradients, {setting.name}"
    return name, lambda: setting.directions(False), lambda: setting.directions(True), note


PAIRS = {
    "gradient-sketch": partial(gradient, True),
    "gradient-second": second_pass,
    "gradient-dense": partial(gradient, False),
    "features-bounded": bounded_features,
    "captured-clip": partial(captured, "tiny-clip", "textures", 16),
    "captured-clip-digits": partial(captured, "tiny-clip", "digits", 16),
    "captured-llava": partial(captured, "tiny-llava", "scene-captions", 8),
    "captured-llava-exists": partial(captured, "tiny-llava", "scene-exists", 8),
}
