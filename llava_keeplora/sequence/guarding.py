"""The stages GUARDED and ROLLED_BACK: a task is judged, and leaves the sequence if it must."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llava_keeplora.files import write_json
from llava_keeplora.guard import NEW, OLD, WATCH, Limit, judge, verdict_lines
from llava_keeplora.guard.noise import NOISE_EXAMPLES, Variant, noise_examples, noise_record, variants
from llava_keeplora.journal import Journal, retried, shrunk
from llava_keeplora.models import DTYPES
from llava_keeplora.run_folder import (
    ASIDE,
    GUARD,
    PREDICTIONS,
    ROLLBACK,
    ROLLED_BACK,
    SHRINK,
    THEN,
    UNSHRUNK,
    WATCHED,
    Stage,
    file_name,
    read_record,
)
from llava_keeplora.sequence.answers import predict_whole, read_answers
from llava_keeplora.sequence.method_state import MethodState, Outcome
from llava_keeplora.sequence.shrinking import cost_of_search, cost_of_shrinking, search
from llava_keeplora.start import Task
from llava_keeplora_eval.paired_bootstrap import Outcome as LimitOutcome
from llava_keeplora_eval.predictions import read_predictions


def guard(state: MethodState, index: int) -> Outcome:
    """Answer the watched recipes and judge the task; for index 0, measure the noise on the base."""
    if index == 0 and state.config.label != state.first_alike:
        return [], {}
    paths = _answer_watched(state, index)
    record = state.path(index, GUARD)
    if index == 0:
        paths += _write_noise(state, record)
        return [record, *paths], {}
    verdict = _verdict(state, index)
    if verdict[THEN] == SHRINK:
        state.context.progress.extend(cost_of_search(state, index))
        verdict["shrink"], files = search(state, index)
        paths += files
        verdict[THEN] = SHRINK if verdict["shrink"]["lambda"] else ROLLBACK
    if state.context.rank == 0:
        write_json(record, verdict)
        lines = verdict_lines(verdict)
        state.context.progress.note("\n".join([f"{state.config.label} {lines[0]}", *lines[1:]]))
    state.context.barrier()
    then = {THEN: verdict[THEN]} if verdict[THEN] else {}
    return [record, *paths], {"ship": verdict["ship"], **then}


def cost_of_guarding(state: MethodState, index: int) -> float:
    """Return the cost of the stage GUARDED, in forward passes."""
    if index == 0 and state.config.label != state.first_alike:
        return 0.0
    watched = sum(len(task.test) for task in state.context.watched)
    noise = 2 * sum(min(NOISE_EXAMPLES, len(task.test)) for task in _judged(state)) if index == 0 else 0
    return state.context.family.eval_cost * (watched + noise)


# --- answers -------------------------------------------------------------------------------------------


def _judged(state: MethodState) -> list[Task]:
    """Return the tasks that have limits, and the watched recipes."""
    settings, context = state.context.config.guard, state.context
    return [*(context.tasks if settings and settings.judges_tasks else ()), *context.watched]


def _answer_watched(state: MethodState, index: int) -> list[Path]:
    """Write the model's answers to the watched recipes and return their files."""
    context, paths = state.context, []
    if not context.watched:
        return []
    state.rebuild(index)
    with context.zero.engaged(context.family.model):
        for task in context.watched:
            paths.append(state.path(index, WATCHED) / f"{file_name(task.name)}.jsonl")
            predict_whole(state, index, task, paths[-1])
    return paths


# --- the verdict ---------------------------------------------------------------------------------------


def _verdict(state: MethodState, index: int) -> dict[str, Any]:
    """Return the verdict on a task, with what follows from it."""
    settings = state.context.config.guard
    assert settings is not None, "the stage is of runs with a guard"
    verdict = judge(state.name(index), list(_limits(state, index)), settings.confidence)
    then = None if verdict["ship"] else settings.on_failure
    if shrunk(state.journal.entries, index) is not None:
        verdict["shrink"] = cost_of_shrinking(state, index)
        then = then and ROLLBACK
    elif then == SHRINK and not any(
        record["outcome"] == LimitOutcome.BROKEN and record["of"] != NEW for record in verdict["limits"]
    ):
        then = ROLLBACK  # A smaller update gains less still.
    return verdict | {THEN: then}


def _limits(state: MethodState, index: int) -> Iterator[Limit]:
    """Yield the limits of a task: of the new one, of each old one, and of each watched recipe."""
    settings, noise = state.context.config.guard, _noise(state)
    assert settings is not None, "the stage is of runs with a guard"

    def limit(of: str, task: Task, folder: str, least: float) -> Limit:
        before, after = (read_answers(state, stage, task, folder) for stage in (index - 1, index))
        return Limit(of, task.test, before, after, least, noise.get(task.name))

    if (gain := settings.new_task.min_gain) is not None:
        yield limit(NEW, state.tasks[index - 1], PREDICTIONS, gain)
    if (least := settings.old_tasks.least) is not None:
        for task in state.tasks[: index - 1]:
            yield limit(OLD, task, PREDICTIONS, least)
    if (least := settings.watch_tasks.least) is not None:
        for task in state.context.watched:
            yield limit(WATCH, task, WATCHED, least)


# --- the noise -----------------------------------------------------------------------------------------


def _noise(state: MethodState) -> dict[str, float]:
    """Return recipe → the largest change of the base's score with other batches or another precision."""
    record = read_record(state.context.workspace.task(state.first_alike, 0, "base") / GUARD)
    return {name: values["points"] for name, values in record["noise"].items()}


def _write_noise(state: MethodState, record: Path) -> list[Path]:
    """Score the base again with other batches and another precision, and write by how much that differs."""
    context, paths, noise = state.context, [], {}
    others = variants(context.config.evaluation.batch_size, DTYPES[context.config.model.dtype])
    for task in _judged(state):
        before = read_answers(state, 0, task, WATCHED if task in context.watched else PREDICTIONS)
        few, again = Task(task.recipe, task.train, noise_examples(task.test)), {}
        for variant in others:
            paths.append(state.path(0, WATCHED) / f"{file_name(task.name)}.{variant.name}.jsonl")
            _answer_otherwise(state, few, paths[-1], variant)
            again[variant.name] = read_predictions(paths[-1], few.test)
        noise[task.name] = noise_record(few.test, before, again)
    if context.rank == 0:
        batch, dtype_name = others[0].batch_size, str(others[1].dtype).removeprefix("torch.")
        write_json(record, {"noise": noise, "batch_size": batch, "dtype": dtype_name})
        worst = max(noise, key=lambda name: float(noise[name]["points"]))
        context.progress.note(
            f"noise of the untouched model, with batches of {batch} and with {dtype_name}: at most "
            f"{noise[worst]['points']:.1f} points ({worst}, {noise[worst]['flips']} of "
            f"{noise[worst]['n']} answers)"
        )
    context.barrier()
    return paths


def _answer_otherwise(state: MethodState, task: Task, path: Path, variant: Variant) -> None:
    """Write the base's answers with another size of batches or in another precision."""
    context, dtype = state.context, variant.dtype
    state.rebuild(0)
    with (
        context.zero.engaged(context.family.model),
        torch.autocast(context.device.type, dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        predict_whole(state, 0, task, path, variant.batch_size)


# --- the rollback --------------------------------------------------------------------------------------


def roll_back(state: MethodState, index: int) -> Outcome:
    """Take a task out of the method's sequence; its folder is moved when the journal says so.

    The journal's entry comes first, and `set_aside` moves the folder then, or at the next start after a kill.
    """
    folder = state.path(index).name
    count = len(state.rolled_back) + len(retried(state.journal.entries))
    aside = f"{ASIDE}/{count + 1:02d}-{file_name(state.name(index))}"
    return [], {ROLLED_BACK: {"task": state.name(index), "folder": folder, "aside": aside}}


def set_aside(state: MethodState) -> None:
    """Move what the journal has set aside, in the main process; see `move_aside`."""
    if state.context.rank == 0:
        move_aside(state.folder, state.journal)
    state.context.barrier()


def move_aside(folder: Path, journal: Journal) -> None:
    """Move the folders of tasks that were rolled back and the files of whole updates, unless that is done."""
    moves = [
        (entry.info[ROLLED_BACK]["folder"], entry.info[ROLLED_BACK]["aside"])
        for entry in journal.entries
        if entry.stage == Stage.ROLLED_BACK
    ]
    for entry in journal.superseded:
        moves += [(name.replace(f"/{UNSHRUNK}/", "/", 1), name) for name in entry.files]
    for source, target in ((folder / before, folder / after) for before, after in moves):
        if source.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source, target)
