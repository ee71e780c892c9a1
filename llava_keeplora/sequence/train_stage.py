"""The stage TRAINED: train on one task and write the update of the weights."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from llava_keeplora.adapters import (
    Delta,
    FullDelta,
    attach,
    detach,
    read_adapters,
    save_deltas,
    since_start,
)
from llava_keeplora.deepspeed_zero import gathered, number_count, trained_values
from llava_keeplora.distributed import all_gather_object
from llava_keeplora.files import write_json
from llava_keeplora.journal import shrunk
from llava_keeplora.methods import Mixture, TaskContext
from llava_keeplora.models import MixedTask
from llava_keeplora.models.layouts import part_of
from llava_keeplora.run_folder import (
    DELTA,
    KEPT,
    TRAIN,
    TRAINER,
    Stage,
)
from llava_keeplora.sequence import adoption, shrinking
from llava_keeplora.sequence.checkpoint import StepCheckpoint
from llava_keeplora.sequence.data import stage_seed
from llava_keeplora.sequence.method_state import MethodState, Outcome, write_if_any
from llava_keeplora.sequence.mixed_data import MixedData
from llava_keeplora.sequence.passes import GRADIENT_COST, task_context
from llava_keeplora.sequence.reporters import end_own_place, give_own_place
from llava_keeplora.sequence.trainer import (
    FURTHER,
    Indices,
    TaskTrainer,
    check_finite,
    collate_with_rows,
    release,
    without_timings,
)
from llava_keeplora.start import Task
from llava_keeplora.start.training_args import training_arguments
from llava_keeplora.steps import Budget


def train(state: MethodState, index: int) -> Outcome:
    """Train the task's adapters, or take over an update from elsewhere, and write the update and the log.

    A task that was trained and keeps a share of its update alone is not trained again.

    Raises:
        TrainingError: if a trained value is not finite.
    """
    if (factor := shrunk(state.journal.entries, index)) is not None:
        return shrinking.take_share(state, index, factor)
    if state.source(index):
        return adoption.take_over(state, index)
    context, task, inits = state.context, state.tasks[index - 1], state.inits(index)
    ctx = task_context(state, index, Stage.TRAINED)
    if state.method.mixes and not state.method.budget(index, ctx.budgets).steps:
        return _untrained(state, index)
    state.begin(index, state.method.weight_offset(inits))
    set_seed(ctx.seed)
    wrapper = attach(context.family.model, inits, state.method.dropout, master_copies=context.zero.used)
    before = {name: _copied(module) for name, module in state.full.items()}
    for module in state.full.values():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)

    def read_deltas() -> dict[str, Delta | FullDelta]:
        changes = {name: _change_and_restore(state.full[name], start) for name, start in before.items()}
        adapters = {
            name: since_start(delta, inits[name])
            for name, delta in read_adapters(context.family.model, inits).items()
        }
        return {**changes, **state.method.finalize_deltas(ctx, adapters)}

    try:
        with state.method.training_context(ctx, context.family.model):
            trained_parameters = sum(
                number_count(p) for p in context.family.model.parameters() if p.requires_grad
            )
            history, examples, deltas, extra_state = _train(state, ctx, task, read_deltas)
    finally:
        detach(wrapper)
    check_finite(task.name, history["steps"], deltas, extra_state)
    further = sum(all_gather_object(state.passes.pop(FURTHER, 0)))
    if further:
        examples = examples | {index: examples.get(index, 0) + further}
    delta_path, log_path, extra_path = (state.path(index, name) for name in (DELTA, TRAIN, KEPT))
    if context.rank == 0:
        save_deltas(delta_path, deltas)
        write_if_any(extra_path, extra_state)
        write_json(log_path, history | {"report": ctx.report})
        StepCheckpoint(state.path(index)).remove()
    context.barrier()
    files = [delta_path, log_path] + [extra_path] * bool(extra_state)
    info = {
        "steps": history["steps"],
        "trained_parameters": trained_parameters,
        "training_examples": len(state.inputs[index - 1]),
        "examples": {str(source): count for source, count in sorted(examples.items())},
    }
    info |= {"further_examples": further} if further else {}
    return files, info | context.objects.callback_names()


def _untrained(state: MethodState, index: int) -> Outcome:
    """Write the update and the log of a task that trains nothing."""
    delta_path, log_path = state.path(index, DELTA), state.path(index, TRAIN)
    if state.context.rank == 0:
        save_deltas(delta_path, {})
        write_json(log_path, {"steps": 0, "history": [], "report": {}})
    state.context.barrier()
    examples = {"training_examples": len(state.inputs[index - 1]), "examples": {}}
    return [delta_path, log_path], {"steps": 0, "trained_parameters": 0} | examples


def _train(
    state: MethodState, ctx: TaskContext, task: Task, read_deltas: Callable[[], dict[str, Delta | FullDelta]]
) -> tuple[dict[str, Any], dict[int, int], dict[str, Delta | FullDelta], dict[str, Tensor]]:
    """Run the Trainer; `read_deltas` is called while a DeepSpeed engine still holds its fp32 copies.

    Returns:
        (the Trainer's log, `_examples`, the deltas, the method's `extra_state`).
    """
    context, index = state.context, ctx.index
    cost = GRADIENT_COST * state.method.budget(index, ctx.budgets).batch
    mixture = state.method.mixture(ctx) if state.method.mixes else None
    trainer = TaskTrainer(
        method=state.method,
        ctx=ctx,
        on_step=functools.partial(context.progress.advance, cost),
        rates=_part_learning_rates(state),
        checkpoint=StepCheckpoint(state.path(index)),
        callbacks=context.objects.callbacks,
        **(_mixed_data(state, ctx, mixture) if mixture else _own_data(state, task, index)),
    )
    give_own_place(trainer, context.workspace.root, state.tag(index))
    context.progress.advance(cost * trainer.steps_before)
    with trainer.resumed_state() as folder:
        result = trainer.train(resume_from_checkpoint=folder)
    end_own_place(trainer)
    history = {
        "steps": trainer.state.global_step,
        "loss": result.training_loss,
        "history": without_timings(trainer.state.log_history),
    }
    examples = _examples(state, index, mixture, history["steps"])
    deltas, extra_state = read_deltas(), state.method.extra_state()
    release(trainer, context.family.model)
    del trainer
    gc.collect()
    return history, examples, deltas, extra_state


def _examples(state: MethodState, index: int, mixture: Mixture | None, steps: int) -> dict[int, int]:
    """Return task → examples of it that the steps of a task's training saw, each as often as it was seen."""
    if mixture:
        seen = mixture.sources[: int(mixture.sizes[:steps].sum())]
        return {int(source): int((seen == source).sum()) for source in seen.unique()}
    inputs, world = state.inputs[index - 1], state.context.world
    return {index: Budget.taken(state.trainings[index - 1], len(inputs), world, steps).seen}


def _own_data(state: MethodState, task: Task, index: int) -> dict[str, Any]:
    """Return the model, the arguments and the data of a task's training, as `TaskTrainer` takes them."""
    family, inputs, scale = (
        state.context.family,
        state.inputs[index - 1],
        state.config.random_resized_crop,
    )
    arguments = _training_arguments(state, index)
    crops = family.crops(task.train, scale, arguments.seed) if scale else None
    return {
        "model": family.task(task.recipe),
        "args": arguments,
        "train_dataset": Indices(len(inputs)),
        "crops": crops,
        "data_collator": functools.partial(collate_with_rows, (crops or inputs).collate),
    }


def _mixed_data(state: MethodState, ctx: TaskContext, mixture: Mixture) -> dict[str, Any]:
    """Return the same for a training on the data of several tasks."""
    family, seed, scale = state.context.family, ctx.seed, state.config.random_resized_crop
    sources = sorted(set(mixture.sources.tolist()))
    splits = {source: state.training_data(source) for source in sources}
    training = state.trainings[ctx.index - 1]
    size = int(training.get("per_device_train_batch_size", 8))
    data = MixedData(
        mixture,
        {source: state.training_inputs(source) for source in sources},
        {source: family.crops(split, scale, seed) for source, split in splits.items()} if scale else {},
        size,
        state.context.world,
    )
    return {
        "model": MixedTask({source: family.task(split.recipe) for source, split in splits.items()}),
        "args": _training_arguments(state, ctx.index, data.arguments(training)),
        "train_dataset": data,
        "crops": data if scale else None,
        "data_collator": data.collate,
    }


def _part_learning_rates(state: MethodState) -> dict[int, float]:
    """Return id of a parameter → learning rate, for the parts that set their own rate."""
    rates: dict[int, float] = {}
    family = state.context.family
    for part, settings in state.config.parts.items():
        if settings.learning_rate is None:
            continue
        rates |= {
            id(parameter): settings.learning_rate
            for name, parameter in family.model.named_parameters()
            if part_of(name, family.parts) == part and parameter.requires_grad
        }
    return rates


def _training_arguments(
    state: MethodState, index: int, training: Mapping[str, Any] | None = None
) -> TrainingArguments:
    root = state.context.workspace.root.resolve().name
    return training_arguments(
        training or state.trainings[index - 1],
        output_dir=str(state.path(index, TRAINER)),
        run_name=f"{state.config.training.get('run_name') or root}/{state.tag(index)}",
        seed=stage_seed(state.context.config.seed, index, Stage.TRAINED),
    )


def _copied(module: nn.Module) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters(recurse=False))
    with gathered(parameters.values()):
        return {name: p.detach().clone() for name, p in parameters.items()}


@torch.no_grad()
def _change_and_restore(module: nn.Module, before: Mapping[str, Tensor]) -> FullDelta:
    """Return the change of a module that was trained in full, and restore the module."""
    parameters = dict(module.named_parameters(recurse=False))
    change = FullDelta(
        {name: (trained_values(p) - before[name].float()).cpu() for name, p in parameters.items()}
    )
    with gathered(parameters.values(), write=True):
        for name, p in parameters.items():
            p.copy_(before[name])
    return change
