"""One pass over a task's data: the first-step gradient, or the features, of every adapted layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llava_keeplora.capture.taps import DenseGradients, feature_taps, shared_inputs


def gradient_pass(task, layers: Mapping[str, nn.Linear], batches: Iterable[Mapping[str, Tensor]], total: int) -> dict[str, Tensor]:
    """G = ∇_W of the mean loss over the data, per layer (KeepLoRA, step 2 of one task).

    The weights stay frozen: G is summed as dYᵀX from taps. What does not depend on the batch (class
    prompts) runs once; its cotangent is summed over the batches and sent back once, which is the same sum.

    Args:
        task: a `llava_keeplora.models.TaskModel`; its loss is the mean over a batch's weight (images, or answer tokens).
        layers: name → linear layer.
        batches: batches; in several processes, each process's share.
        total: weight of all batches of all processes.

    Returns:
        name → G (out, in) in fp32. A layer that received no gradient is missing or zero.
    """
    taps = DenseGradients(layers)
    with taps.attached(), task.constants():
        for batch in batches:
            loss = task(**batch)["loss"]
            (loss * (task.weight(batch) / total)).backward()
    for name in layers:
        if is_distributed():
            layer = layers[name]
            taps.gradients.setdefault(name, torch.zeros(layer.out_features, layer.in_features, device=layer.weight.device))
            dist.all_reduce(taps.gradients[name])
    return taps.gradients


def feature_pass(
    task,
    layers: Mapping[str, nn.Linear],
    parts: Mapping[str, str],
    batches: Iterable[Mapping[str, Tensor]],
    statistic: Callable[[int], object],
) -> tuple[dict[str, object], dict[str, str]]:
    """Statistics of the inputs X of every layer over the data (KeepLoRA, step 8 of one task).

    Layers that read the same tensor (q, k, v) share one statistic. Padding tokens are left out.

    Args:
        task: a `llava_keeplora.models.TaskModel`.
        layers: name → linear layer.
        parts: name → the part it belongs to.
        batches: batches; in several processes, each process's share.
        statistic: builds an accumulator for an input width; it has `add(x, mask)` and summable `tensors`.

    Returns:
        leader name → statistic, and layer name → leader name.
    """
    batches = iter(batches)
    first = next(batches)
    with torch.no_grad():
        leaders = shared_inputs(layers, lambda: task(**task.first(first)))
        statistics = {leader: statistic(layers[leader].in_features) for leader in dict.fromkeys(leaders.values())}
        current: dict[str, Tensor] = {}

        def sink(name: str, x: Tensor) -> None:
            statistics[name].add(x, task.token_mask(parts[name], current))

        with feature_taps({name: layers[name] for name in statistics}, sink), task.constants():
            for batch in itertools.chain([first], batches):
                current.update(batch)
                task(**batch)
    if is_distributed():
        for value in statistics.values():
            for tensor in value.tensors:
                dist.all_reduce(tensor)
    return statistics, leaders


def is_distributed() -> bool:
    """Whether several processes take part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
