"""Checks of the contract of model families, on a small checkpoint and a small task."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llava_keeplora.config import EvaluationConfig, ModelConfig
from llava_keeplora.models import Family, Prepared, open_model
from llava_keeplora.registries import FAMILY_MEMBERS, MODEL_FAMILIES
from llava_keeplora.testing.small import registered_name, write_small_clip, write_small_tasks
from llava_keeplora_recipes import TaskData, load_recipe, load_split


def check_skeleton(family: Family, data: TaskData) -> None:
    """Check that the skeleton has the layers of the loaded model, each under its part's prefix."""
    layers: list[dict[str, tuple[int, ...]]] = []
    for prepare in (family.skeleton, family.load):
        prepare(torch.float32)
        shapes: dict[str, tuple[int, ...]] = {}
        for part, targets in family.targets.items():
            for name, layer in family.linear_layers(part, targets).items():
                assert name.startswith(family.parts[part]), f"the layer '{name}' is not below part '{part}'"
                assert family.model.get_submodule(name) is layer, f"no layer of the model is named '{name}'"
                shapes[name] = tuple(layer.weight.shape)
        layers.append(shapes)
    assert layers[0] == layers[1], f"'{family.name}' has other layers without its weights than with them"
    assert layers[0], f"'{family.name}' names no linear layers to adapt"


def check_inputs(family: Family, data: TaskData) -> None:
    """Check that every example has a weight, and a batch's loss is the weighted mean of its examples'."""
    inputs = family.inputs(data, Prepared(family, data))
    assert len(inputs) == len(inputs.weights) == len(data), (
        f"'{family.name}' takes {len(inputs)} examples with {len(inputs.weights)} weights from {len(data)}"
    )
    assert all(weight >= 1 for weight in inputs.weights), f"'{family.name}' gives an example no weight"
    batch = inputs.collate(range(len(data)))
    family.model.eval()
    task = family.task(data.recipe)
    with torch.no_grad():
        losses = [task(**batch)["loss"] for _ in range(2)]
        parts = [float(task(**inputs.collate([i]))["loss"]) for i in range(len(data))]
    assert torch.isfinite(losses[0]) and torch.equal(*losses), (
        f"the loss of '{family.name}' is not reproducible"
    )
    mean = sum(w * loss for w, loss in zip(inputs.weights, parts, strict=True)) / sum(inputs.weights)
    assert abs(mean - float(losses[0])) <= 1e-4 * max(1.0, abs(mean)), (
        f"the loss of a batch of '{family.name}' is {float(losses[0]):.6f}, and its examples' weighted mean "
        f"{mean:.6f}"
    )


def check_layer_gradients(family: Family, data: TaskData) -> None:
    """Check that the loss reaches every layer but those of `layers_without_gradient`."""
    layers, declared = {}, set()
    for part, targets in family.targets.items():
        layers.update(family.linear_layers(part, targets))
        declared.update(family.layers_without_gradient(part, targets))
    for layer in layers.values():
        layer.weight.requires_grad_(True)
        layer.weight.grad = None
    inputs = family.inputs(data, Prepared(family, data))
    family.task(data.recipe)(**inputs.collate(range(len(data))))["loss"].backward()
    without = {n for n, layer in layers.items() if layer.weight.grad is None or not layer.weight.grad.any()}
    family.model.zero_grad(set_to_none=True)
    assert without == declared & layers.keys(), (
        f"`layers_without_gradient` of '{family.name}' differs from what the loss reaches: "
        f"{sorted(without ^ (declared & layers.keys()))[:3]}"
    )


def check_predictions(family: Family, data: TaskData) -> None:
    """Check that every example gets one answer, and the same one each time."""
    predictor = family.predictor(data.recipe, Prepared(family, data))
    answers = [predictor.predict([data[i] for i in range(len(data))]) for _ in range(2)]
    assert len(answers[0]) == len(data), (
        f"'{family.name}' gives {len(answers[0])} answers to {len(data)} examples"
    )
    assert answers[0] == answers[1], f"'{family.name}' answers the same examples in two ways"


FAMILY_CHECKS: tuple[Callable[[Family, TaskData], None], ...] = (
    check_skeleton,
    check_inputs,
    check_layer_gradients,
    check_predictions,
)


def check_family(
    family: str | type,
    model: str | Path | None = None,
    recipe: str | Path | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> None:
    """Check that a model family keeps the contract; see `FAMILY_CHECKS`.

    Args:
        family: the class, or its name as in a configuration.
        model: a small checkpoint; a small random CLIP when None.
        recipe: the recipe of a small task with a `test` split; that of a generated task when None.
        evaluation: settings of the section `evaluation` of a configuration.

    Raises:
        AssertionError: the family breaks a rule, which the message names.
    """
    name = registered_name(family, MODEL_FAMILIES)
    missing = [
        member for member in FAMILY_MEMBERS if not callable(getattr(MODEL_FAMILIES[name], member, None))
    ]
    assert not missing, f"'{name}' lacks {', '.join(missing)}"
    with _small_model(model, recipe) as (checkpoint, task):
        settings = EvaluationConfig(**(evaluation or {}))
        opened = open_model(ModelConfig(str(checkpoint), family=name), settings)
        data = load_split(load_recipe(task), "test")
        for check in FAMILY_CHECKS:
            check(opened, data)


@contextmanager
def _small_model(model: str | Path | None, recipe: str | Path | None) -> Iterator[tuple[Any, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_small_clip(Path(folder) / "clip") if model is None else model
        yield checkpoint, write_small_tasks(Path(folder) / "tasks")[0] if recipe is None else recipe
