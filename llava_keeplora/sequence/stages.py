"""The stages of a task.

Each reads what earlier stages wrote and returns (the files that it wrote, the `info` of its journal entry).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava_keeplora.files import write_json
from llava_keeplora.methods import METHODS
from llava_keeplora.run_folder import (
    ADAPTERS,
    CACHED_PREDICTIONS,
    CAPACITY,
    CONSOLIDATED,
    FORECAST,
    OWN_ANSWERS,
    PREPARED,
    ROUTES,
    SCORES,
    STATE,
    Stage,
    read_record,
)
from llava_keeplora.sequence import adoption
from llava_keeplora.sequence.answers import predict_whole, predictions_path, task_predictor
from llava_keeplora.sequence.forecast import forecast, shortage
from llava_keeplora.sequence.guarding import guard, roll_back
from llava_keeplora.sequence.inference_latency import EXAMPLES, TOKENS, seconds_per_example
from llava_keeplora.sequence.method_state import MethodState, Outcome, write_if_any
from llava_keeplora.sequence.passes import task_context
from llava_keeplora.sequence.second_training import train_again
from llava_keeplora.sequence.shrinking import shrink
from llava_keeplora.sequence.train_stage import train
from llava_keeplora.start import Task
from llava_keeplora_eval import score
from llava_keeplora_eval.predictions import count_routes

logger = logging.getLogger(__name__)


def plan(state: MethodState, index: int) -> Outcome:
    """Record the data and recipes that a task depends on; for index 0, those of all tasks."""
    return [], plan_record(state, index)


def plan_record(state: MethodState, index: int) -> dict[str, Any]:
    """Return the journal's record of a task's data, with which a later start compares them."""
    tasks = state.context.tasks if index == 0 else state.tasks[index - 1 : index]
    reference = {"reference": state.method.reference.record} if state.method.reference else {}
    general = state.context.general.get(state.config.label)
    reference |= {"general": general.record} if general else {}
    prompts = [{"test_prompts": list(task.recipe.test_prompts)} if state.averaged else {} for task in tasks]
    return {
        "seed": state.context.config.seed,
        "tasks": [task.record() | prompt for task, prompt in zip(tasks, prompts, strict=True)],
        **reference,
    }


def prepare(state: MethodState, index: int) -> Outcome:
    """Let the method initialise the task's adapters, and write them; of an adopted task, write its update."""
    if state.source(index):
        return adoption.prepare(state, index)
    state.begin(index)
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
            | ({} if init.train_B else {"train_B": False})
            for name, init in inits.items()
        }
        write_json(path, {"layers": layers, "unreachable": state.unreachable, "report": ctx.report})
    state.context.barrier()
    counts = {
        "layers": len(inits),
        "left_out": len(ctx.report.get("left_out", {})),
        "unreachable": len(state.unreachable),
    }
    answers = state.path(index, OWN_ANSWERS)
    return [path] + [tensors] * bool(starts) + [answers] * answers.exists(), counts


def consolidate(state: MethodState, index: int) -> Outcome:
    """Let the method update its state on the merged model; for index 0, on the base."""
    if index or not state.method.base_is_cacheable:
        return _consolidate(state, index), {}
    files = {name: state.path(0, name) for name in (CONSOLIDATED, STATE)}
    seconds = state.context.once(_base_cache_key(state), files, lambda: _consolidate(state, 0))
    return [path for path in files.values() if path.exists()], _reused(seconds)


def _base_cache_key(state: MethodState) -> dict[str, Any]:
    """Return everything that a method's state on the base depends on, except the model."""
    name = state.config.method
    return {
        "stage": Stage.CONSOLIDATED,
        "tasks": {task.name: task.record()["train"] for task in state.context.tasks},
        "statistics_gb": state.context.config.memory.statistics_gb,
        "method": METHODS.portable_name(name),
        **({"source": METHODS.source_files(name)} if METHODS.is_plugin(name) else {}),
        "options": state.config.options,
        "parts": {part: dataclasses.asdict(settings) for part, settings in state.config.parts.items()},
    }


def _consolidate(state: MethodState, index: int) -> list[Path]:
    # A killed attempt may have left this stage's own state behind, which must not be loaded.
    state.rebuild(index, states=index)
    ctx = task_context(state, index, Stage.CONSOLIDATED)
    ctx.fit = functools.partial(train_again, state, ctx)
    state.method.after_task(ctx)
    if index and CAPACITY in ctx.report:
        ctx.report[FORECAST] = _forecast(state, index, ctx.report[CAPACITY])
    added = state.method.state_dict()
    tensors, record = state.path(index, STATE), state.path(index, CONSOLIDATED)
    if state.context.rank == 0:
        write_if_any(tensors, added)
        write_json(record, ctx.report)
    state.context.barrier()
    # Several processes must load the main process's directions: each may have rounded the sums differently.
    state.loaded = (index, index + 1) if state.context.world == 1 else None
    return [record] + [tensors] * bool(added)


def _forecast(
    state: MethodState, index: int, capacity: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return layer → its remaining room, and warn if that is too little for the tasks to come."""
    before = [read_record(state.path(task, CONSOLIDATED))[CAPACITY] for task in range(index)]
    rooms = forecast([*before, capacity], state.layers)
    warning = shortage(rooms, state.layers, len(state.tasks) - index)
    if warning:
        logger.warning("%s: %s", state.config.label, warning)
    return {name: room.to_dict() for name, room in rooms.items()}


def evaluate(state: MethodState, index: int) -> Outcome:
    """Answer every task's test split and score the answers; of a bound, those that `scored` names."""
    path, context = state.path(index, SCORES), state.context
    if index == 0 and state.config.label != state.first_alike:
        predictions, seconds = [], 0.0
        scores = read_record(context.workspace.task(state.first_alike, 0, "base") / SCORES)
    else:
        tasks = state.scored(index)
        predictions, seconds, scores = [predictions_path(state, index, task) for task in tasks], 0.0, {}
        state.rebuild(index)
        with context.zero.engaged(context.family.model):
            for task in tasks:
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


def score_task(state: MethodState, index: int, task: Task) -> dict[str, Any]:
    """Score a task's answers, count what they were routed to, and write the score into the matrix."""
    path = predictions_path(state, index, task)
    result = score(task.test, path).to_dict()
    if routes := count_routes(path, task.test):
        result[ROUTES] = routes
    state.fill_matrix(index, {task.name: result})
    state.write_matrix()
    return result


def _answer(state: MethodState, index: int, task: Task) -> float:
    """Write every missing answer to a task's test split into its file.

    Returns:
        how long another run took for answers of the untouched model that were reused, in seconds; 0 if
        nothing was reused.
    """
    path = predictions_path(state, index, task)

    def make() -> None:
        predict_whole(state, index, task, path)

    if index == 0:
        evaluation = state.context.config.evaluation
        key = {
            "stage": Stage.EVALUATED,
            "task": task.name,
            "data": task.record()["test"],
            "max_new_tokens": evaluation.max_new_tokens,
            "generation": evaluation.generation,
        }
        key |= {"test_prompts": list(task.recipe.test_prompts)} if state.averaged else {}
        return state.context.once(key, {CACHED_PREDICTIONS: path}, make)
    make()
    return 0.0


def close(state: MethodState, index: int) -> Outcome:
    """Sum up the time of a task's stages; after the last task, also measure the latency of answers."""
    journal = state.journal
    seconds = sum(entry.seconds for entry in [*journal.superseded, *journal.entries] if entry.task == index)
    needs = {"task_id_at_test": state.method.info.task_id_at_test} if index else {}
    latency = {"test_seconds": _latency(state, index)} if index and index == state.count else {}
    return [], {"seconds": round(seconds, 1), **needs, **latency}


def _latency(state: MethodState, index: int) -> dict[str, float]:
    """Return seconds per example of the untouched and the trained model, on the same batch."""
    task, context = state.tasks[index - 1], state.context
    # Not larger than the batches of the evaluation, which fit in memory.
    size = min(EXAMPLES, context.config.evaluation.batch_size, len(task.test))
    examples = [task.test[i] for i in range(size)]
    context.base.apply([])
    with context.zero.engaged(context.family.model):
        untouched = seconds_per_example(task_predictor(state, 0, task, TOKENS), examples)
    state.rebuild(index)
    with context.zero.engaged(context.family.model):
        learned = seconds_per_example(task_predictor(state, index, task, TOKENS), examples)
    return {"untouched": untouched, "learned": learned}


def _reused(seconds: float) -> dict[str, float]:
    """Return the journal's note on reused files: how long the original run took to make them."""
    return {"taken_seconds": round(seconds, 3)} if seconds else {}


#: Stage → its function.
STAGES: dict[Stage, Callable[[MethodState, int], Outcome]] = {
    Stage.PLANNED: plan,
    Stage.PREPARED: prepare,
    Stage.TRAINED: train,
    Stage.CONSOLIDATED: consolidate,
    Stage.EVALUATED: evaluate,
    Stage.GUARDED: guard,
    Stage.ROLLED_BACK: roll_back,
    Stage.SHRUNK: shrink,
    Stage.CLOSED: close,
}
