"""The six stages of a task.

Each reads what earlier stages wrote and returns (the files that it wrote, what the journal notes).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from llava_keeplora.adapters import (
    AdapterInit,
    Delta,
    FullDelta,
    attach,
    detach,
    read_adapters,
    save_deltas,
)
from llava_keeplora.deepspeed_zero import forget_engine, gathered, number_count, trained_values
from llava_keeplora.errors import TrainingError
from llava_keeplora.files import write_json
from llava_keeplora.methods import METHODS, TaskContext
from llava_keeplora.run_folder import (
    ADAPTERS,
    CONSOLIDATED,
    DELTA,
    KEPT,
    PREDICTIONS,
    PREPARED,
    SCORES,
    STATE,
    TRAIN,
    Stage,
    file_name,
    read_record,
)
from llava_keeplora.sequence.checkpoint import StepCheckpoint
from llava_keeplora.sequence.data import stage_seed
from llava_keeplora.sequence.forecast import forecast, shortage
from llava_keeplora.sequence.inference_latency import EXAMPLES, TOKENS, seconds_per_example
from llava_keeplora.sequence.method_state import MethodState, write_if_any
from llava_keeplora.sequence.passes import GRADIENT_COST, task_context
from llava_keeplora.sequence.reporters import end_own_place, give_own_place
from llava_keeplora.sequence.trainer import CURE, Indices, TaskTrainer, without_timings
from llava_keeplora.start import Task
from llava_keeplora.start.training_args import training_arguments
from llava_keeplora_eval import predict_to_file, score
from llava_keeplora_eval.predictions import join_shards
from llava_keeplora_eval.predictors import Predictor

logger = logging.getLogger(__name__)

Outcome = tuple[list[Path], dict[str, Any]]


# --- PLANNED -----------------------------------------------------------------------------------------


def plan(state: MethodState, index: int) -> Outcome:
    """Record the data and recipes that a task depends on; for index 0, those of all tasks."""
    return [], plan_record(state, index)


def plan_record(state: MethodState, index: int) -> dict[str, Any]:
    """Return what the journal notes of a task's data, by which a later start knows them again."""
    tasks = state.tasks if index == 0 else state.tasks[index - 1 : index]
    reference = {"reference": state.method.reference.record} if state.method.reference else {}
    prompts = [{"test_prompts": list(task.recipe.test_prompts)} if state.averaged else {} for task in tasks]
    return {
        "seed": state.context.config.seed,
        "tasks": [task.record() | read for task, read in zip(tasks, prompts, strict=True)],
        **reference,
    }


# --- PREPARED ----------------------------------------------------------------------------------------


def prepare(state: MethodState, index: int) -> Outcome:
    """Let the method choose where the task's adapters start."""
    state.rebuild(index - 1)
    ctx = task_context(state, index, Stage.PREPARED)
    inits = state.method.init_adapters(ctx)
    for name, why in ctx.report.get("left_out", {}).items():
        logger.warning("%s: layer %s is left out of task %s: %s", state.config.label, name, ctx.name, why)
    tensors, path = state.path(index, ADAPTERS), state.path(index, PREPARED)
    starts = {
        f"{name}.{factor}": getattr(init, factor)
        for name, init in inits.items()
        for factor in ("A", "B")
        if getattr(init, factor) is not None
    }
    if state.context.rank == 0:
        write_if_any(tensors, starts)
        layers = {
            name: {"rank": init.rank, "alpha": init.alpha, "train_A": init.train_A}
            for name, init in inits.items()
        }
        write_json(path, {"layers": layers, "unreachable": state.unreachable, "report": ctx.report})
    state.context.barrier()
    counts = {
        "layers": len(inits),
        "left_out": len(ctx.report.get("left_out", {})),
        "unreachable": len(state.unreachable),
    }
    return [path] + [tensors] * bool(starts), counts


# --- TRAINED -----------------------------------------------------------------------------------------


def train(state: MethodState, index: int) -> Outcome:
    """Train the task's adapters and keep their update.

    Raises:
        TrainingError: a trained value is not finite.
    """
    context, task, inits = state.context, state.tasks[index - 1], state.inits(index)
    ctx = task_context(state, index, Stage.TRAINED)
    state.rebuild(index - 1, offset=state.method.weight_offset(inits))
    set_seed(ctx.seed)
    wrapper = attach(context.family.model, inits, state.method.dropout, master_copies=context.zero.used)
    before = {name: _copied(module) for name, module in state.full.items()}
    for module in state.full.values():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)

    def read_deltas() -> dict[str, Delta | FullDelta]:
        changes = {name: _taken_back(state.full[name], start) for name, start in before.items()}
        adapters = {
            name: _from_start(delta, inits[name])
            for name, delta in read_adapters(context.family.model, inits).items()
        }
        return {**changes, **state.method.finalize_deltas(ctx, adapters)}

    try:
        with state.method.training_context(ctx, context.family.model):
            trained = sum(number_count(p) for p in context.family.model.parameters() if p.requires_grad)
            history, deltas, kept = _train(state, ctx, task, read_deltas)
    finally:
        detach(wrapper)
    _check_finite(task, history["steps"], deltas, kept)
    delta_path, log_path, kept_path = (state.path(index, name) for name in (DELTA, TRAIN, KEPT))
    if context.rank == 0:
        save_deltas(delta_path, deltas)
        write_if_any(kept_path, kept)
        write_json(log_path, history | {"report": ctx.report})
        StepCheckpoint(state.path(index)).remove()
    context.barrier()
    files = [delta_path, log_path] + [kept_path] * bool(kept)
    return files, {"steps": history["steps"], "trained_parameters": trained}


def _train(
    state: MethodState, ctx: TaskContext, task: Task, read_deltas: Callable[[], dict[str, Delta | FullDelta]]
) -> tuple[dict[str, Any], dict[str, Delta | FullDelta], dict[str, Tensor]]:
    """Run the Trainer; `read_deltas` is called while a DeepSpeed engine still holds its fp32 copies.

    Returns:
        (the Trainer's log, the deltas, what the method keeps besides).
    """
    context, index = state.context, ctx.index
    arguments = _training_arguments(state, index)
    model, scale = context.family.task(task.recipe), state.config.random_resized_crop
    # `check_rows` lets random crops through for CLIP alone.
    crops = context.family.crops(task.train, scale, arguments.seed) if scale else None  # type: ignore[attr-defined]
    cost = GRADIENT_COST * arguments.train_batch_size * arguments.gradient_accumulation_steps * context.world
    trainer = TaskTrainer(
        method=state.method,
        ctx=ctx,
        on_step=functools.partial(context.progress.advance, cost),
        model=model,
        args=arguments,
        rates=_part_learning_rates(state),
        checkpoint=StepCheckpoint(state.path(index)),
        train_dataset=Indices(len(context.inputs[index - 1])),
        crops=crops,
        data_collator=(crops or context.inputs[index - 1]).collate,
    )
    give_own_place(trainer, context.workspace.root, state.tag(index))
    context.progress.advance(cost * trainer.steps_before)
    result = trainer.go()
    end_own_place(trainer)
    history = {
        "steps": trainer.state.global_step,
        "loss": result.training_loss,
        "history": without_timings(trainer.state.log_history),
    }
    deltas, kept = read_deltas(), state.method.extra_state()
    trainer.accelerator.free_memory()
    forget_engine(context.family.model.parameters())
    context.family.model.eval().requires_grad_(False)
    del trainer
    gc.collect()
    return history, deltas, kept


def _check_finite(
    task: Task, steps: int, deltas: Mapping[str, Delta | FullDelta], kept: Mapping[str, Tensor]
) -> None:
    values = [(name, value) for name, delta in deltas.items() for value in delta.tensors.values()]
    for name, value in [*values, *kept.items()]:
        if not torch.isfinite(value).all():
            raise TrainingError(
                f"the weights of task '{task.name}' are not finite after its {steps} steps, first in layer "
                f"{name}",
                CURE,
            )


def _part_learning_rates(state: MethodState) -> dict[int, float]:
    """Return id of a parameter → learning rate, for the parts that set one of their own."""
    rates: dict[int, float] = {}
    family = state.context.family
    for part, settings in state.config.parts.items():
        if settings.learning_rate is None:
            continue
        prefix = family.parts[part] + "."
        rates |= {
            id(parameter): settings.learning_rate
            for name, parameter in family.model.named_parameters()
            if name.startswith(prefix) and parameter.requires_grad
        }
    return rates


def _training_arguments(state: MethodState, index: int) -> TrainingArguments:
    root = state.context.workspace.root.resolve().name
    return training_arguments(
        state.trainings[index - 1],
        output_dir=str(state.path(index, "trainer")),
        run_name=f"{state.config.training.get('run_name') or root}/{state.tag(index)}",
        seed=stage_seed(state.context.config.seed, index, Stage.TRAINED),
    )


def _copied(module: nn.Module) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters(recurse=False))
    with gathered(parameters.values()):
        return {name: p.detach().clone() for name, p in parameters.items()}


def _from_start(delta: Delta, init: AdapterInit) -> Delta:
    """Return an adapter's update less the one that it began with, on the host."""
    return Delta(delta.A.cpu(), delta.B.cpu() - (init.B if init.B is not None else 0), delta.scale)


@torch.no_grad()
def _taken_back(module: nn.Module, before: Mapping[str, Tensor]) -> FullDelta:
    """Return what training changed in a module without an adapter, and restore the module."""
    parameters = dict(module.named_parameters(recurse=False))
    change = FullDelta(
        {name: (trained_values(p) - before[name].float()).cpu() for name, p in parameters.items()}
    )
    with gathered(parameters.values(), write=True):
        for name, p in parameters.items():
            p.copy_(before[name])
    return change


# --- CONSOLIDATED ------------------------------------------------------------------------------------


def consolidate(state: MethodState, index: int) -> Outcome:
    """Let the method add to what it protects, on the merged model; for index 0, on the base."""
    if index or not state.method.base_is_cacheable:
        return _consolidate(state, index), {}
    files = {name: state.path(0, name) for name in (CONSOLIDATED, STATE)}
    seconds = state.context.once(_base_facts(state), files, lambda: _consolidate(state, 0))
    return [path for path in files.values() if path.exists()], _reused(seconds)


def _base_facts(state: MethodState) -> dict[str, Any]:
    """Return what a cacheable base depends on besides the model."""
    name = state.config.method
    return {
        "stage": Stage.CONSOLIDATED,
        "tasks": {task.name: task.record()["train"] for task in state.tasks},
        "statistics_gb": state.context.config.memory.statistics_gb,
        "method": METHODS.portable_name(name),
        **({"source": METHODS.source_files(name)} if METHODS.is_plugin(name) else {}),
        "options": state.config.options,
        "parts": {part: dataclasses.asdict(settings) for part, settings in state.config.parts.items()},
    }


def _consolidate(state: MethodState, index: int) -> list[Path]:
    # A killed attempt may have left this stage's own state behind; it must not count twice.
    state.rebuild(index, states=index)
    ctx = task_context(state, index, Stage.CONSOLIDATED)
    state.method.after_task(ctx)
    if index and "capacity" in ctx.report:
        ctx.report["forecast"] = _forecast(state, index, ctx.report["capacity"])
    added = state.method.state_dict()
    tensors, record = state.path(index, STATE), state.path(index, CONSOLIDATED)
    if state.context.rank == 0:
        write_if_any(tensors, added)
        write_json(record, ctx.report)
    state.context.barrier()
    # Several processes go on with the first one's directions, because other machines may round the same sums
    # otherwise.
    state.loaded = (index, index + 1) if state.context.world == 1 else None
    return [record] + [tensors] * bool(added)


def _forecast(
    state: MethodState, index: int, capacity: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return layer → for how many more tasks it has room, and warn where that is too few."""
    before = [read_record(state.path(task, CONSOLIDATED))["capacity"] for task in range(index)]
    rooms = forecast([*before, capacity], state.layers)
    warning = shortage(rooms, state.layers, len(state.tasks) - index)
    if warning:
        logger.warning("%s: %s", state.config.label, warning)
    return {name: room.to_dict() for name, room in rooms.items()}


# --- EVALUATED ---------------------------------------------------------------------------------------


def evaluate(state: MethodState, index: int) -> Outcome:
    """Answer every task's test split and score the answers."""
    path, context = state.path(index, SCORES), state.context
    if index == 0 and state.config.label != state.first_alike:
        predictions, seconds = [], 0.0
        scores = read_record(context.workspace.task(state.first_alike, 0, "base") / SCORES)
    else:
        predictions, seconds, scores = [predictions_path(state, index, task) for task in state.tasks], 0.0, {}
        state.rebuild(index)
        with context.zero.engaged(context.family.model):
            for task in state.tasks:
                seconds += _answer(state, index, task)
                if context.rank == 0:
                    scores[task.name] = score_task(state, index, task)
    if context.rank == 0:
        write_json(path, scores)
    context.barrier()
    state.fill_matrix(index, read_record(path))
    if context.rank == 0:
        state.write_matrix()
    return [path, *predictions], _reused(seconds)


def predictions_path(state: MethodState, index: int, task: Task) -> Path:
    """Return the file of a task's answers after so many tasks."""
    return state.path(index, PREDICTIONS) / f"{file_name(task.name)}.jsonl"


def score_task(state: MethodState, index: int, task: Task) -> dict[str, Any]:
    """Score a task's answers, and enter the score into the matrix and its file."""
    result = score(task.test, predictions_path(state, index, task)).to_dict()
    state.fill_matrix(index, {task.name: result})
    state.write_matrix()
    return result


def _answer(state: MethodState, index: int, task: Task) -> float:
    """Make sure that every answer to a task is in its file.

    Returns:
        how long another run took for answers of the untouched model that were reused, in seconds; 0 if made
        now.
    """
    path = predictions_path(state, index, task)

    def make() -> None:
        _predict(state, index, task)
        state.context.barrier()
        if state.context.rank == 0:
            join_shards(path, task.test)

    if index == 0:
        evaluation = state.context.config.evaluation
        facts = {
            "stage": Stage.EVALUATED,
            "task": task.name,
            "data": task.record()["test"],
            "max_new_tokens": evaluation.max_new_tokens,
            "generation": evaluation.generation,
        }
        facts |= {"test_prompts": list(task.recipe.test_prompts)} if state.averaged else {}
        return state.context.once(facts, {"predictions.jsonl": path}, make)
    make()
    return 0.0


def _predict(state: MethodState, index: int, task: Task) -> None:
    """Answer this process's share; processes wait for each other only afterwards."""
    context = state.context
    cost = context.family.eval_cost * context.world
    predict_to_file(
        _predictor(state, index, task),
        task.test,
        predictions_path(state, index, task),
        batch_size=context.config.evaluation.batch_size,
        advance=lambda count: context.progress.advance(cost * count),
        shard=(context.rank, context.world),
        # All processes gather shards of weights together, so all must make equally many predictions.
        rounds=context.most if context.zero.partitions else None,
    )


def _predictor(state: MethodState, index: int, task: Task, tokens: int | None = None) -> Predictor:
    """Return what answers a task's test examples after so many tasks; the model alone before the first."""
    context = state.context
    predictor = context.family.predictor(task.recipe, context.cache.split(task.test), tokens)
    if state.averaged:
        predictor = predictor.with_test_prompts()  # type: ignore[attr-defined]  # CLIP's, see `check_rows`
    return state.method.predictor(predictor, task.name) if index else predictor


# --- CLOSED ------------------------------------------------------------------------------------------


def close(state: MethodState, index: int) -> Outcome:
    """Sum up a task's time; after the last one, also measure the latency of answers."""
    seconds = sum(entry.seconds for entry in state.journal.entries if entry.task == index)
    latency = {"test_seconds": _latency(state, index)} if index and index == state.count else {}
    return [], {"seconds": round(seconds, 1), **latency}


def _latency(state: MethodState, index: int) -> dict[str, float]:
    """Return seconds per example of the untouched and the trained model, on the same batch."""
    task, context = state.tasks[index - 1], state.context
    # No larger than a batch that was answered before, which fits.
    size = min(EXAMPLES, context.config.evaluation.batch_size, len(task.test))
    examples = [task.test[i] for i in range(size)]
    context.base.apply([])
    with context.zero.engaged(context.family.model):
        untouched = seconds_per_example(_predictor(state, 0, task, TOKENS), examples)
    state.rebuild(index)
    with context.zero.engaged(context.family.model):
        learned = seconds_per_example(_predictor(state, index, task, TOKENS), examples)
    return {"untouched": untouched, "learned": learned}


def _reused(seconds: float) -> dict[str, float]:
    """Return what the journal notes of files that another run made: how long it took for them."""
    return {"taken_seconds": round(seconds, 3)} if seconds else {}


#: What runs in each stage.
STAGES: dict[Stage, Callable[[MethodState, int], Outcome]] = {
    Stage.PLANNED: plan,
    Stage.PREPARED: prepare,
    Stage.TRAINED: train,
    Stage.CONSOLIDATED: consolidate,
    Stage.EVALUATED: evaluate,
    Stage.CLOSED: close,
}
