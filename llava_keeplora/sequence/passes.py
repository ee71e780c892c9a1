"""The passes over a task's data that a method can request: gradients, features, or the batches themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llava_keeplora.adapters import Delta
from llava_keeplora.capture import autocast, feature_pass, gradient_pass
from llava_keeplora.distributed import sum_over_processes
from llava_keeplora.methods import TaskContext
from llava_keeplora.methods.shares import Share, Stretch
from llava_keeplora.run_folder import CONSOLIDATED, Stage, read_record
from llava_keeplora.sequence import auto_energy
from llava_keeplora.sequence.data import Batches, stage_seed
from llava_keeplora.sequence.method_state import MethodState
from llava_keeplora.sequence.own_answers import own_answers
from llava_keeplora_eval.predictors import Predictor
from llava_keeplora_recipes import Example

#: Cost of one image, in forward passes: forward and backward, and forward alone.
GRADIENT_COST, FEATURE_COST = 3, 1


def task_context(state: MethodState, index: int, stage: Stage) -> TaskContext:
    """Return the context that a method gets in a stage of a task.

    Args:
        state: the method's state.
        index: the task, 0 for the base.
        stage: the stage, which determines the seed.
    """
    context = state.context
    return TaskContext(
        index=index,
        name=state.name(index),
        layers=state.layers,
        gradients=functools.partial(run_gradient_pass, state, index),
        features=functools.partial(run_feature_pass, state, index),
        seed=stage_seed(context.config.seed, index, stage),
        statistics_bytes=int(context.config.memory.statistics_gb * 1e9),
        batches=functools.partial(counted_batches, state, index),
        model=context.family.model,
        outputs=functools.partial(run_output_pass, state, index),
        repeats=_repeats(state, index),
        examples=functools.partial(training_examples, state, index),
        predictor=lambda: training_predictor(state, index),
        task=lambda: context.family.task(state.tasks[index - 1].recipe),
        pretrained=context.pretrained,
        deltas=functools.partial(state.deltas, index - (stage != Stage.CONSOLIDATED)),
        weights=lambda: context.base,
        base=read_record(state.path(0, CONSOLIDATED)) if index else {},
        tasks=len(state.tasks),
        choose=functools.partial(auto_energy.choose_energy_weight, context, state.layers),
        own_answers=functools.partial(own_answers, state, index),
        data=state.training_data,
        learned_rows=lambda source: state.training_inputs(source).rows,
        budgets=state.budgets(),
        passes=state.passes,
    )


def _repeats(state: MethodState, index: int) -> bool:
    """Return `TaskContext.repeats` of a task."""
    own = index > 0 and not state.method.mixes and not state.config.random_resized_crop
    return own and state.budgets()[index - 1].repeats


def run_gradient_pass(
    state: MethodState,
    index: int,
    fraction: Share,
    statistics: Mapping[str, Any],
    per_example: bool = False,
) -> int:
    """Feed the first-step gradient of every layer into its statistic; see `capture.gradient_pass`.

    For a task without training data the rows of its update stand in for the gradient; see `update_rows`.

    Args:
        state: the method's state.
        index: the task.
        fraction: fraction of its training data, or a stretch of them; see `shares`. A stretch that does not
            start at the beginning continues the statistics of what comes before it.
        statistics: layer name → statistic.
        per_example: whether the statistic gets the gradient of each example's negative log-likelihood instead
            of those of the batches' shares of the mean loss.

    Returns:
        the number of examples of all processes.
    """
    context = state.context
    if not len(state.inputs[index - 1]):
        for name, rows in update_rows(state, index).items():
            if name in statistics:
                statistics[name].add(rows, torch.eye(len(rows), device=rows.device))
        return 1
    batches, chosen = _batches(state, index, fraction, GRADIENT_COST, 1 if per_example else None)
    task, total = context.family.task(state.tasks[index - 1].recipe), chosen.weight
    if per_example:
        total = 1
    elif state.method.counts_examples:
        task, total = task.counting_examples(), len(chosen.chosen)
    if isinstance(fraction, Stretch) and fraction.start:
        # The mean over what has been read, in which the earlier stretches weigh less than before.
        before = replace(chosen, fraction=replace(fraction, start=0, stop=fraction.start))
        earlier = len(before.chosen) if state.method.counts_examples else before.weight
        total += earlier
        _carry_on(statistics.values(), earlier / total, context.rank)
    training = state.config.training
    with (
        context.zero.engaged(task),
        autocast(training, context.device.type),
        task.recomputing(training),
    ):
        gradient_pass(task, state.adapted, batches, total, statistics, per_example)
    state.passes["gradient"] += chosen.share
    return len(chosen.chosen)


def run_feature_pass(
    state: MethodState,
    index: int,
    statistics: Callable[[list[list[str]]], Mapping[str, Any]],
    fraction: Share = 1.0,
) -> Mapping[str, Any]:
    """Feed every layer's input features into statistics; see `capture.feature_pass`.

    For a task without training data the rows of its update stand in for features; see `update_rows`.

    Args:
        state: the method's state.
        index: the task.
        statistics: called with the layers' names, grouped by the tensor that they read; returns layer name →
            statistic.
        fraction: see `run_gradient_pass`.

    Returns:
        layer name → statistic.
    """
    context = state.context
    if not len(state.inputs[index - 1]):
        rows = update_rows(state, index)
        of_layer = statistics([[name] for name in rows])
        for name, statistic in of_layer.items():
            statistic.add(rows[name][None], None)
        return of_layer
    batches, chosen = _batches(state, index, fraction, FEATURE_COST)
    state.passes["feature"] += chosen.share
    task = context.family.task(state.tasks[index - 1].recipe)
    task = task.at_every_position() if state.method.every_position else task
    parts = {name: layer.part for name, layer in state.layers.items()}

    def continuing(groups: list[list[str]]) -> Mapping[str, Any]:
        of_layer = statistics(groups)
        if isinstance(fraction, Stretch) and fraction.start:
            _carry_on(of_layer.values(), 1.0, context.rank)
        return of_layer

    with context.zero.engaged(task), autocast(state.config.training, context.device.type):
        return feature_pass(task, state.adapted, parts, batches, continuing)


def run_output_pass(
    state: MethodState, index: int, compute: Callable[[Mapping[str, Tensor]], Tensor]
) -> Tensor:
    """Return what `compute` gives for a task's training data; see `TaskContext.outputs`.

    Every process computes its share, in batches that do not depend on training's shuffling, and gets all.
    """
    batches, chosen = _batches(state, index, 1.0, FEATURE_COST)
    count, world, outputs = len(chosen.chosen), chosen.world, None
    # The processes' batches of equal number are neighbours: process r has every `world`-th example from r on.
    for start, (batch, counts) in zip(range(0, count, world * chosen.batch_size), batches, strict=True):
        output = compute(batch).float()
        rows = min(world * chosen.batch_size, count - start)
        joined = output.new_zeros(rows, *output.shape[1:])
        if counts:
            joined[chosen.rank :: world] = output
        sum_over_processes([joined])
        if outputs is None:
            outputs = torch.empty(count, *output.shape[1:])
        outputs[start : start + rows] = joined.cpu()
    return outputs


def _carry_on(statistics: Iterable[Any], factor: float, rank: int) -> None:
    """Scale statistics that are summed over processes once more; the first process has what they hold."""
    for statistic in {id(statistic): statistic for statistic in statistics}.values():
        for tensor in statistic.tensors:
            tensor.mul_(factor if rank == 0 else 0.0)


def update_rows(state: MethodState, index: int) -> dict[str, Tensor]:
    """Return layer name → rows X (n, in) with XᵀX = ΔWᵀ ΔW, of an adopted task's update.

    ΔW answers an input only through the directions of its rows. An input that later updates cannot feel in
    these directions is therefore answered by ΔW as before.
    """
    rows = {}
    for name, delta in state.deltas(index)[-1].items():
        if name in state.layers:
            device = state.layers[name].module.weight.device
            if isinstance(delta, Delta):
                # B = Q R gives (B A)ᵀ B A = (R A)ᵀ R A, without the dense product.
                R = torch.linalg.qr(delta.B.to(device).double()).R
                rows[name] = (delta.scale * R @ delta.A.to(device).double()).float()
            else:
                rows[name] = delta.dense(device)
    return rows


def counted_batches(state: MethodState, index: int) -> Iterator[dict[str, Tensor]]:
    """Yield this process's batches of a task's training data, in order, without padding batches."""
    batches, chosen = _batches(state, index, 1.0, FEATURE_COST)
    state.passes["forward"] += chosen.share
    return (batch for batch, counts in batches if counts)


def training_predictor(state: MethodState, index: int) -> Predictor:
    """Return the model's own predictor of a task's training examples."""
    task, context = state.tasks[index - 1], state.context
    return context.family.predictor(task.recipe, context.cache.split(task.train))


def training_examples(state: MethodState, index: int) -> Iterator[list[Example]]:
    """Yield this process's training examples of a task, in batches as large as those of the evaluation."""
    context, data = state.context, state.tasks[index - 1].train
    share, size = range(context.rank, len(data), context.world), context.config.evaluation.batch_size
    for start in range(0, len(share), size):
        rows = share[start : start + size]
        yield [data[row] for row in rows]
        state.passes["forward"] += len(rows)
        context.progress.advance(FEATURE_COST * len(rows) * context.world)


def _batches(
    state: MethodState, index: int, fraction: Share, cost: float, size: int | None = None
) -> tuple[Iterator[tuple[dict[str, Tensor], bool]], Batches]:
    """Return (an iterator over the batches that reports progress, the batches themselves).

    Args:
        state, index, fraction: see `run_gradient_pass`.
        cost: of one example.
        size: examples per batch; training's when None.
    """
    context = state.context
    size = size or int(state.config.training.get("per_device_train_batch_size", 8))
    batches = Batches(state.inputs[index - 1], size, fraction, context.rank, context.world, context.device)

    def with_progress() -> Iterator[tuple[dict[str, Tensor], bool]]:
        for batch, counts in batches:
            yield batch, counts
            context.progress.advance(cost * len(batch["labels"]) * context.world)

    return with_progress(), batches
