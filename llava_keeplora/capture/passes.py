"""Passes over a task's data that capture the first-step gradient, or the features, of every adapted layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from llava_keeplora.capture.hooks import feature_hooks, gradient_hooks, shared_inputs
from llava_keeplora.distributed import all_gather_object, sum_over_processes

#: Loss scale of the backward pass in fp16, whose smallest number is 6e-8 and largest 65504.
HEADROOM = 2.0**10

#: A batch, and whether it counts: a process that has fewer batches than the others passes through the model
#: with one that does not.
Batch = tuple[Mapping[str, Tensor], bool]


class GradientStatistic(Protocol):
    """Statistic of a layer's gradient, see `llava_keeplora.subspace`; `tensors` are summed over processes."""

    tensors: list[Tensor]

    def add(self, x: Tensor, dy: Tensor) -> None:
        """Add the gradient dYᵀX of a layer's input x (..., in) and output gradient dy (..., out)."""


class FeatureStatistic(Protocol):
    """Statistic of a layer's inputs, see `llava_keeplora.subspace`; `tensors` are summed over processes."""

    tensors: list[Tensor]

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add a layer's inputs (..., in), only those at the positions of the mask unless it is None."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode, and give every module its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def gradient_pass(
    task,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Batch],
    total: int,
    statistics: Mapping[str, GradientStatistic],
    per_example: bool = False,
) -> None:
    """Feed G = ∇_W of the mean loss over the data to a statistic per layer (KeepLoRA, step 2 of one task).

    The weights stay frozen: G arrives as a sum of dYᵀX from hooks, and whether it is ever formed is up to the
    statistic. What does not depend on the batch (class prompts) is computed once; its cotangent is summed
    over the batches and propagated back once, which gives the same sum.

    Under fp16 autocast, the loss of a batch is scaled up by a power of two to about `HEADROOM` times its own
    mean, whatever `total` is, and dY is scaled back in fp32 before it is summed; a batch's share of the mean
    over all data would underflow (loss scaling, Micikevicius et al., ICLR 2018, section 3.2).

    Args:
        task: a `llava_keeplora.models.TaskModel`; its loss is the mean over a batch's weight (images, or
            answer tokens).
        layers: name → linear layer.
        batches: the batches; with several processes, this process's share, equally many in each.
        total: weight of all batches of all processes.
        statistics: layer name → the statistic of its gradient; summed over processes at the end.
        per_example: whether every batch is one example and keeps its own gradient: nothing is shared between
            batches, so that a statistic gets the whole gradient of each, prompts included.
    """
    batches = iter(batches)
    first = next(batches)
    in_fp16 = _is_fp16(next(iter(layers.values())).weight.device.type)
    scale: float | Tensor = (
        math.ldexp(HEADROOM, 1 - math.frexp(task.weight(first[0]) / total)[1]) if in_fp16 else 1.0
    )

    def callback(name: str, x: Tensor, dy: Tensor) -> None:
        statistics[name].add(x, dy.float() / scale if in_fp16 else dy)

    shared = nullcontext(()) if per_example else task.constants()
    with gradient_hooks({name: layers[name] for name in statistics}, callback), shared as constants:
        for batch, counts in itertools.chain([first], batches):
            loss = task(**batch)["loss"]
            (loss * (scale * task.weight(batch) / total if counts else 0.0)).backward()
            # Frees the graph, in which 8-bit layers keep their inputs beyond the backward pass.
            del loss
        for output, cotangent in constants:
            # Summed over all batches, the cotangent grows with the data, so it gets a scale of its own.
            if in_fp16:
                cotangent = cotangent / scale
                scale = torch.ldexp(
                    cotangent.new_tensor(HEADROOM), 1 - torch.frexp(cotangent.abs().max()).exponent
                )
                cotangent = cotangent * scale
            output.backward(cotangent.to(output.dtype))
    _reduce(statistics.values())


def _is_fp16(device_type: str) -> bool:
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16


def feature_pass(
    task,
    layers: Mapping[str, nn.Linear],
    parts: Mapping[str, str],
    batches: Iterable[Batch],
    statistics: Callable[[list[list[str]]], Mapping[str, FeatureStatistic]],
) -> Mapping[str, FeatureStatistic]:
    """Feed the inputs X of every layer over the data to statistics (KeepLoRA, step 8 of one task).

    Padding tokens are left out.

    Args:
        task: a `llava_keeplora.models.TaskModel`.
        layers: name → linear layer.
        parts: name → the part it belongs to.
        batches: the batches; with several processes, this process's share, equally many in each.
        statistics: called with the names of the layers that the model reaches, grouped by the tensor that
            they read (q, k and v read the same one); returns layer name → statistic. Layers of a group may
            share one, and layers without one are skipped.

    Returns: layer name → its statistic, summed over processes, without layers that no token of any process
        reached.
    """
    batches = iter(batches)
    first = next(batches)
    with torch.no_grad():
        leaders = shared_inputs(layers, lambda: task.probe(first[0]))
        groups: dict[str, list[str]] = {}
        for name, leader in leaders.items():
            groups.setdefault(leader, []).append(name)
        of_layer = statistics(list(groups.values()))
        of_leader = {
            leader: _distinct(of_layer[name] for name in names if name in of_layer)
            for leader, names in groups.items()
        }
        current: dict[str, Tensor] = {}
        reached: set[str] = set()

        def callback(leader: str, x: Tensor) -> None:
            if not counted:
                return
            reached.add(leader)
            mask = task.token_mask(parts[leader], current)
            if mask is not None and len(of_leader[leader]) > 1 and not bool(mask.all()):
                x, mask = x[mask], None  # Masked once instead of in every statistic.
            for statistic in of_leader[leader]:
                statistic.add(x, mask)

        with (
            feature_hooks({leader: layers[leader] for leader in of_leader if of_leader[leader]}, callback),
            task.constants(),
        ):
            for batch, counted in itertools.chain([first], batches):  # noqa: B007  `callback` reads it
                current.clear()
                current.update(batch)
                task(**batch)
    _reduce(_distinct(of_layer.values()))
    everywhere = set().union(*all_gather_object(reached))
    return {name: statistic for name, statistic in of_layer.items() if leaders[name] in everywhere}


def autocast(training: Mapping[str, object], device_type: str) -> AbstractContextManager[object]:
    """Return the autocast context of training's precision, for the passes.

    Args:
        training: arguments for `transformers.TrainingArguments`.
        device_type: `cpu` or `cuda`.
    """
    dtype = autocast_dtype(training)
    return torch.autocast(device_type, dtype) if dtype else nullcontext()


def autocast_dtype(training: Mapping[str, object]) -> torch.dtype | None:
    """Return the dtype in which training computes products; None for the model's own.

    Args:
        training: arguments for `transformers.TrainingArguments`.
    """
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((dtype for key, dtype in kinds.items() if training.get(key)), None)


def _distinct(statistics: Iterable[object]) -> list:
    return list({id(statistic): statistic for statistic in statistics}.values())


def _reduce(statistics: Iterable[GradientStatistic | FeatureStatistic]) -> None:
    sum_over_processes(tensor for statistic in statistics for tensor in statistic.tensors)
