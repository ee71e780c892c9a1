"""One pass over a task's data: the first-step gradient, or the features, of every adapted layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from llava_keeplora.capture.hooks import feature_hooks, gradient_hooks, shared_inputs
from llava_keeplora.distributed import all_gather_object, sum_over_processes

#: By how much a loss is raised before it is sent back in fp16, whose smallest number is 6e-8 and largest
#: 65504.
HEADROOM = 2.0**10

#: A batch, and whether it counts: where one process has fewer batches than another, it goes along with one
#: that doesn't.
Batch = tuple[Mapping[str, Tensor], bool]


class GradientStatistic(Protocol):
    """What a layer's gradient is summed into, see `llava_keeplora.subspace`.

    `tensors` add up over processes.
    """

    tensors: list[Tensor]

    def add(self, x: Tensor, dy: Tensor) -> None:
        """Add the gradient that a layer's input and its output's gradient make."""


class FeatureStatistic(Protocol):
    """What a layer's inputs are summed into, see `llava_keeplora.subspace`.

    `tensors` add up over processes.
    """

    tensors: list[Tensor]

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add a layer's inputs, at the positions of the mask."""


def gradient_pass(
    task,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Batch],
    total: int,
    statistics: Mapping[str, GradientStatistic],
) -> None:
    """Feed G = ∇_W of the mean loss over the data to a statistic per layer (KeepLoRA, step 2 of one task).

    The weights stay frozen: G arrives as a sum of dYᵀX from taps, and whether it is ever formed is up to the
    statistic. What does not depend on the batch (class prompts) runs once; its cotangent is summed over the
    batches and sent back once, which is the same sum.

    Under fp16 autocast a batch's loss is sent back some `HEADROOM` times as large as its own mean, by a power
    of two, whatever `total` is,
    and dY is set right in fp32 where it is summed: as a share of all data it would be lost (loss scaling,
    Micikevicius et al., ICLR 2018, section 3.2).

    Args:
        task: a `llava_keeplora.models.TaskModel`; its loss is the mean over a batch's weight (images, or
            answer tokens).
        layers: name → linear layer.
        batches: batches; in several processes, each process's share, equally many everywhere.
        total: weight of all batches of all processes.
        statistics: layer name → what its gradient is added to; summed over processes in the end.
    """
    batches = iter(batches)
    first = next(batches)
    in_fp16 = _is_fp16(next(iter(first[0].values())).device.type)
    raised: float | Tensor = (
        math.ldexp(HEADROOM, 1 - math.frexp(task.weight(first[0]) / total)[1]) if in_fp16 else 1.0
    )

    def callback(name: str, x: Tensor, dy: Tensor) -> None:
        statistics[name].add(x, dy.float() / raised if in_fp16 else dy)

    with gradient_hooks({name: layers[name] for name in statistics}, callback), task.constants() as constants:
        for batch, counts in itertools.chain([first], batches):
            loss = task(**batch)["loss"]
            (loss * (raised * task.weight(batch) / total if counts else 0.0)).backward()
            # With it goes the graph, in which 8-bit layers keep their inputs beyond the backward pass.
            del loss
        for output, cotangent in constants:
            # Over all batches, these have become as large as the data are many.
            if in_fp16:
                cotangent = cotangent / raised
                raised = torch.ldexp(
                    cotangent.new_tensor(HEADROOM), 1 - torch.frexp(cotangent.abs().max()).exponent
                )
                cotangent = cotangent * raised
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
        batches: batches; in several processes, each process's share, equally many everywhere.
        statistics: given the names of the layers that can be reached, grouped by the tensor that they read
            (q, k and v read the same), makes a statistic per layer; layers of a group may share one, and
            layers without one are left alone.

    Returns:
        layer name → its statistic, summed over processes; without those that no token of any process came to.
    """
    batches = iter(batches)
    first = next(batches)
    with torch.no_grad():
        leaders = shared_inputs(layers, lambda: task.probe(first[0]))
        groups: dict[str, list[str]] = {}
        for name, leader in leaders.items():
            groups.setdefault(leader, []).append(name)
        made = statistics(list(groups.values()))
        fed = {
            leader: _distinct(made[name] for name in names if name in made)
            for leader, names in groups.items()
        }
        current: dict[str, Tensor] = {}
        reached: set[str] = set()

        def callback(leader: str, x: Tensor) -> None:
            if not counted:
                return
            reached.add(leader)
            mask = task.token_mask(parts[leader], current)
            if mask is not None and len(fed[leader]) > 1 and not bool(mask.all()):
                x, mask = x[mask], None  # picked once for all of them
            for statistic in fed[leader]:
                statistic.add(x, mask)

        with (
            feature_hooks({leader: layers[leader] for leader in fed if fed[leader]}, callback),
            task.constants(),
        ):
            for batch, counted in itertools.chain([first], batches):  # noqa: B007  `callback` reads it
                current.clear()
                current.update(batch)
                task(**batch)
    _reduce(_distinct(made.values()))
    everywhere = set().union(*all_gather_object(reached))
    return {name: statistic for name, statistic in made.items() if leaders[name] in everywhere}


def autocast(training: Mapping[str, object], device_type: str) -> AbstractContextManager[object]:
    """The precision that training uses, for the passes too.

    Args:
        training: arguments for `transformers.TrainingArguments`.
        device_type: `cpu` or `cuda`.
    """
    chosen = autocast_dtype(training)
    return torch.autocast(device_type, chosen) if chosen else nullcontext()


def autocast_dtype(training: Mapping[str, object]) -> torch.dtype | None:
    """What training computes products in, if not in the model's own precision.

    Args:
        training: arguments for `transformers.TrainingArguments`.
    """
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((dtype for key, dtype in kinds.items() if training.get(key)), None)


def _distinct(statistics: Iterable[object]) -> list:
    return list({id(statistic): statistic for statistic in statistics}.values())


def _reduce(statistics: Iterable[GradientStatistic | FeatureStatistic]) -> None:
    sum_over_processes(tensor for statistic in statistics for tensor in statistic.tensors)
