"""The passes of a memory over a user's batches, and what stands for them where there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llava_keeplora.adapters import Delta
from llava_keeplora.capture import evaluating, feature_pass, gradient_pass
from llava_keeplora.memory.batch_task import BatchTask, MaskedStatistic
from llava_keeplora.methods import Layer
from llava_keeplora.models.task_model import blocks_recomputing

Make = Callable[[list[list[str]]], Mapping[str, Any]]


def run_gradient_pass(
    task: BatchTask, layers: Mapping[str, Layer], scale: float, fraction: float, statistics: Mapping[str, Any]
) -> None:
    """Feed the gradient of the mean loss over a fraction of the batches into a statistic per layer.

    Args:
        task: the model, its loss and the batches.
        layers: name → layer.
        scale: what gradients are divided by; see `BatchTask.scale`.
        fraction: fraction of the batches, evenly spaced.
        statistics: layer name → statistic.
    """
    modules = {name: layer.module for name, layer in layers.items()}
    gradient_pass(task, modules, _evenly(task.batches(), fraction), scale, statistics)  # type: ignore[arg-type]


def run_feature_pass(
    task: BatchTask, layers: Mapping[str, Layer], make: Make, fraction: float = 1.0
) -> dict[str, Any]:
    """Feed the layers' inputs over a fraction of the batches into statistics, padding left out.

    Args:
        task: the model, its loss and the batches.
        layers: name → layer.
        make: called with the layers' names, grouped by the tensor that they read; returns layer name →
            statistic.
        fraction: fraction of the batches, evenly spaced.

    Returns:
        layer name → statistic, of the layers that the batches reach.

    Raises:
        MethodError: if there is no batch.
    """

    def masked(groups: list[list[str]]) -> dict[str, MaskedStatistic]:
        statistics = make(groups)
        of = {id(statistic): MaskedStatistic(statistic, task) for statistic in statistics.values()}
        return {name: of[id(statistic)] for name, statistic in statistics.items()}

    modules = {name: layer.module for name, layer in layers.items()}
    parts = {name: layer.part for name, layer in layers.items()}
    reached: Mapping[str, Any] = feature_pass(task, modules, parts, _evenly(task.batches(), fraction), masked)
    return {name: statistic.statistic for name, statistic in reached.items()}


def update_features(deltas: Mapping[str, Delta], make: Make, fraction: float = 1.0) -> Mapping[str, Any]:
    """Feed the rows of a task's updates into statistics of features: the directions that they read.

    Args:
        deltas: layer name → the task's update ΔW = s B A.
        make: see `run_feature_pass`; no two layers share a statistic.
        fraction: not used.
    """
    statistics = make([[name] for name in deltas])
    for name, statistic in statistics.items():
        delta = deltas[name]
        # B = QR: the rows of R A have the second moment of those of B A.
        r = torch.linalg.qr(delta.B.double()).R
        statistic.add((delta.scale * r @ delta.A.double()).float(), None)
    return statistics


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze a model in evaluation mode while a pass runs, and give it back as it was."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    with evaluating(model):
        model.requires_grad_(False)
        try:
            with blocks_recomputing(model):
                yield
        finally:
            for p in trainable:
                p.requires_grad_(True)


def _evenly(batches: Iterator[Any], fraction: float) -> Iterator[Any]:
    """Yield a fraction of the batches, evenly spaced from the first on."""
    for index, batch in enumerate(batches):
        if index == 0 or int(index * fraction) > int((index - 1) * fraction):
            yield batch
