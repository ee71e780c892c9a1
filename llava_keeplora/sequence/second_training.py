"""A second training after a task, of adapters that a method keeps for itself; see `TaskContext.fit`.

It is part of the stage CONSOLIDATED and leaves no checkpoint: a killed run does it again from its start.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping
from typing import Any

from transformers import set_seed

from llava_keeplora.adapters import AdapterInit, Delta, attach, detach, read_adapters, since_start
from llava_keeplora.methods import Method, Mixture, TaskContext
from llava_keeplora.models import Inputs, MixedTask
from llava_keeplora.run_folder import TRAINER
from llava_keeplora.sequence.checkpoint import StepCheckpoint
from llava_keeplora.sequence.data import SomeImages
from llava_keeplora.sequence.method_state import MethodState
from llava_keeplora.sequence.mixed_data import MixedData
from llava_keeplora.sequence.passes import GRADIENT_COST
from llava_keeplora.sequence.trainer import TaskTrainer, check_finite, release
from llava_keeplora.start.training_args import training_arguments
from llava_keeplora_recipes import TaskData

#: Arguments of a task's training that are for its own schedule.
SCHEDULE = ("warmup_ratio", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs")
#: Keys of a DeepSpeed configuration that fix a rate or a schedule.
FIXED = ("optimizer", "scheduler")


def train_again(
    state: MethodState,
    ctx: TaskContext,
    inits: Mapping[str, AdapterInit],
    data: Mapping[int, TaskData],
    mixture: Mixture,
    settings: Mapping[str, Any],
) -> dict[str, Delta]:
    """Train adapters by the tasks' loss on the model as it is, and return their updates.

    Every process must call this. What the steps see is entered into `state.seen`.

    Args:
        state: the method's state.
        ctx: the context of the stage.
        inits: layer name → initial adapter.
        data: task → some of its training examples, by the same ids; their texts may be others.
        mixture: the examples of each step, as positions in `data`.
        settings: training arguments in the place of the task's own, its schedule among them.

    Raises:
        TrainingError: if a loss or a trained value is not finite.
    """
    context, model = state.context, state.context.family.model
    set_seed(ctx.seed)
    wrapper = attach(model, inits, master_copies=context.zero.used)
    try:
        trainer = _trainer(state, ctx, data, mixture, settings)
        trainer.train()
        deltas = {
            name: since_start(delta, inits[name]) for name, delta in read_adapters(model, inits).items()
        }
        steps = trainer.state.global_step
        release(trainer, model)
        del trainer
        gc.collect()
    finally:
        detach(wrapper)
    check_finite(ctx.name, steps, deltas, {})
    state.seen.update(int(source) for source in mixture.sources)
    return deltas


def _trainer(
    state: MethodState,
    ctx: TaskContext,
    data: Mapping[int, TaskData],
    mixture: Mixture,
    settings: Mapping[str, Any],
) -> TaskTrainer:
    """Return the trainer of a second training, with the base class's loss and hooks."""
    context, family = state.context, state.context.family
    training = {key: value for key, value in state.trainings[ctx.index - 1].items() if key not in SCHEDULE}
    if isinstance(training.get("deepspeed"), Mapping):
        training["deepspeed"] = {k: v for k, v in training["deepspeed"].items() if k not in FIXED}
    size = int(training.get("per_device_train_batch_size", 8))
    inputs = {source: _inputs(state, source, split) for source, split in data.items()}
    batches = MixedData(mixture, inputs, {}, size, context.world)
    arguments = training_arguments(
        batches.arguments({**training, **settings, "report_to": "none", "save_steps": len(batches) + 1}),
        output_dir=str(state.path(ctx.index, TRAINER)),
        run_name=f"{state.tag(ctx.index)}/second",
        seed=ctx.seed,
    )
    step_cost = GRADIENT_COST * len(mixture.sources) / max(1, len(mixture.sizes))
    return TaskTrainer(
        method=Method(Method.Options()),
        ctx=ctx,
        on_step=functools.partial(context.progress.advance, step_cost),
        rates={},
        checkpoint=StepCheckpoint(state.path(ctx.index)),
        model=MixedTask({source: family.task(split.recipe) for source, split in data.items()}),
        args=arguments,
        train_dataset=batches,
        data_collator=batches.collate,
    )


def _inputs(state: MethodState, source: int, split: TaskData) -> Inputs:
    """Return examples as the model takes them, with the images of the whole training data's cache."""
    whole = state.training_data(source)
    rows = {name: row for row, name in enumerate(whole.ids)}
    images = SomeImages(state.context.cache.split(whole), [rows[name] for name in split.ids])
    return state.context.family.inputs(split, images)
