"""Directions from sketches against the float64 gradient, on the embedded models' real gradients."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from llava_keeplora.capture import gradient_pass
from llava_keeplora.config import ModelConfig
from llava_keeplora.methods import Layer, TaskContext, gradient_init
from llava_keeplora.methods.presets import PaperRules
from llava_keeplora.models import load_model
from llava_keeplora.sequence.data import ImageCache
from llava_keeplora.subspace import SketchedDirections, gradient_sketch, principal_basis, residual
from llava_keeplora_recipes import load_recipe, load_split

EXAMPLES, BATCH = 96, 32


class Exact:
    """The gradient in float64."""

    def __init__(self, layer):
        self.matrix = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)

    @property
    def tensors(self):
        return [self.matrix]

    def add(self, x, dy):
        self.matrix += dy.flatten(0, -2).double().T @ x.flatten(0, -2).double()


def setting(model, recipe, rank, energy):
    """(function statistics → None, adapted layers, bases) of an embedded model on a share of a rendered task."""
    family = load_model(ModelConfig(model))
    data = load_split(load_recipe(recipe), "test").take(range(EXAMPLES))
    inputs = family.inputs(data, ImageCache(family.prepare, budget_gb=1.0).split(data))
    task, count = family.task(data.recipe), min(EXAMPLES, len(inputs))
    batches = [
        (inputs.collate(range(start, min(start + BATCH, count))), True) for start in range(0, count, BATCH)
    ]
    total = sum(task.weight(batch) for batch, _ in batches)
    layers = {
        name: Layer(name, part, module, rank, float(rank), energy, 0.95)
        for part in family.parts
        for name, module in family.linear_layers(part, family.targets[part]).items()
    }
    modules = {name: layer.module for name, layer in layers.items()}
    bases = {name: principal_basis(module.weight.detach(), energy).basis for name, module in modules.items()}
    return (lambda statistics: gradient_pass(task, modules, batches, total, statistics)), layers, bases


def directions(run, layers, bases, seed):
    """What `first_step_directions` finds, with the passes that it made: how many layers each of them fed."""
    fed = []

    def gradients(fraction, statistics):
        fed.append(len(statistics))
        run(statistics)

    ctx = TaskContext(1, "task", layers, gradients, None, seed=seed, statistics_bytes=0)
    ranks = {
        name: min(layer.rank, layer.module.in_features - bases[name].shape[1])
        for name, layer in layers.items()
    }
    found, left_out = gradient_init.first_step_directions(
        ctx, ranks, bases, 1.0, True, PaperRules.directions, lambda layer: nullcontext()
    )
    return found, left_out, fed


# The ranks are the demos'.
@pytest.mark.parametrize(
    ("model", "recipe", "rank"),
    [
        ("tiny-clip", "textures", 16),
        pytest.param("tiny-llava", "scene-captions", 8, marks=pytest.mark.slow),
    ],
)
def test_every_layers_A_from_a_sketch_holds_99_percent_of_the_best_subspaces_energy(
    monkeypatch, model, recipe, rank
):
    monkeypatch.setattr(
        gradient_sketch, "WORTH", math.inf
    )  # sketches even where the gradient would be smaller
    run, layers, bases = setting(model, recipe, rank, 0.85)
    exact = {name: Exact(layer.module) for name, layer in layers.items()}
    run(exact)
    reached = {name for name, one in exact.items() if bool(one.matrix.any())}
    for seed in range(2):
        found, left_out, fed = directions(run, layers, bases, seed)
        assert found.keys() == reached and left_out.keys() == layers.keys() - reached
        assert (
            fed[0] == len(layers)
            and sorted(fed, reverse=True) == fed
            and len(fed) <= 2 * gradient_init.ROUNDS
        )
        assert len(fed) >= 2, "some layers of a real model need a second pass"
        for name, one in found.items():
            assert isinstance(one, SketchedDirections), name
            outside = residual(exact[name].matrix, bases[name].double())
            best = torch.linalg.svdvals(outside).square()[: one.A.shape[1]].sum()
            share = float((outside @ one.A.double()).square().sum() / best)
            assert share >= 0.99, (name, share, one.of_optimum, one.at_least, one.passes)


@pytest.mark.slow
def test_no_pass_holds_more_than_the_first(monkeypatch):
    monkeypatch.setattr(gradient_init.SketchedDirections, "suffices", lambda self: False)
    monkeypatch.setattr(gradient_sketch, "WORTH", math.inf)
    run, layers, bases = setting("tiny-clip", "textures", 16, 0.85)
    held, sketches = [], []

    def counted(statistics):
        first = not isinstance(next(iter(statistics.values())), gradient_sketch.SecondPass)
        sketches[:] = statistics.values() if first else sketches
        alive = sketches if first else [*sketches, *statistics.values()]
        # Buffers and test matrices, those that layers share once; the bases belong to the method.
        tensors = {
            id(t): t
            for one in alive
            for key, t in vars(one).items()
            if isinstance(t, torch.Tensor) and key != "basis"
        }
        held.append(sum(t.numel() for t in tensors.values()))
        run(statistics)

    found, _, fed = directions(counted, layers, bases, 0)
    assert len(fed) == 2 * gradient_init.ROUNDS and {one.passes for one in found.values()} == {
        2 * gradient_init.ROUNDS
    }
    assert max(held) <= held[0], held
