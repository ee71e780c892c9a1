"""The stage SHRUNK: of a task that breaks a limit, the largest λ in W + λΔ that holds every limit.

λ is looked for on training examples that were held out and on the watched recipes, and never on a test split
of the tasks. The stages from TRAINED on then run again, with the smaller update: what comes later knows no
other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_keeplora.adapters import load_deltas, save_deltas
from llava_keeplora.adapters.task_vectors import scale_deltas
from llava_keeplora.files import write_json
from llava_keeplora.guard import NEW, OLD, WATCH
from llava_keeplora.run_folder import (
    DELTA,
    GUARD,
    SCORES,
    SHRUNK,
    TRAIN,
    TRIALS,
    UNSHRUNK,
    WATCHED,
    file_name,
    read_record,
)
from llava_keeplora.sequence.answers import predict_whole, read_answers
from llava_keeplora.sequence.method_state import MethodState, Outcome
from llava_keeplora.start import Task
from llava_keeplora_eval.paired_scores import score_change
from llava_keeplora_eval.predictions import read_predictions

#: How often the interval in which λ is looked for is halved, so that λ is a multiple of 1/16.
HALVINGS = 4


def search(state: MethodState, index: int) -> tuple[dict[str, Any], list[Path]]:
    """Return the record of the search for λ, and the files of its answers.

    The record has λ under `lambda`, 0 if no smaller update holds every limit, and every λ that was tried with
    the changes of the scores. A limit is held if the measured change is on its accepted side. Updates are
    taken to do the less harm the smaller they are: a λ that breaks a limit on a drop is followed by a smaller
    one, every other by a larger one.
    """
    limits, trials, paths = _limits(state, index), [], []
    before, files = _answer(state, index, 0.0, [limit for limit in limits if limit[0] != WATCH])
    before |= {
        task.name: read_answers(state, index - 1, task, WATCHED) for of, task, _ in limits if of == WATCH
    }
    paths += files
    largest, low, high = 0.0, 0.0, 1.0
    for _ in range(HALVINGS):
        factor = (low + high) / 2
        after, files = _answer(state, index, factor, limits)
        paths += files
        changes = [
            {
                "of": of,
                "task": task.name,
                "limit": least,
                "change": score_change(task.test, before[task.name], after[task.name]),
            }
            for of, task, least in limits
        ]
        broken = [change for change in changes if change["change"] < change["limit"]]
        trials.append({"lambda": factor, "holds": not broken, "changes": changes})
        if any(change["of"] != NEW for change in broken):
            high = factor
        else:
            low, largest = factor, largest if broken else factor
    return {"lambda": largest, "trials": trials}, paths


def cost_of_search(state: MethodState, index: int) -> float:
    """Return the cost of `search`, in forward passes."""
    limits = _limits(state, index)
    once = sum(len(task.test) for of, task, _ in limits if of != WATCH)
    each = sum(len(task.test) for _, task, _ in limits)
    return state.context.family.eval_cost * (once + HALVINGS * each)


def _limits(state: MethodState, index: int) -> list[tuple[str, Task, float]]:
    """Return the limits as (of what, a task whose `test` is scored, least accepted change in points)."""
    settings = state.context.config.guard
    assert settings is not None, "the stage is of runs with a guard"
    limits: list[tuple[str, Task, float]] = []
    learned = [Task(t.recipe, t.train, t.held_out) for t in state.tasks[:index] if t.held_out is not None]
    new = state.name(index)
    for task in learned:
        of, least = (NEW, settings.new_task.min_gain) if task.name == new else (OLD, settings.old_tasks.least)
        limits += [(of, task, least)] * (least is not None)
    if (least := settings.watch_tasks.least) is not None:
        limits += [(WATCH, task, least) for task in state.context.watched]
    return limits


def _answer(
    state: MethodState, index: int, factor: float, limits: list[tuple[str, Task, float]]
) -> tuple[dict[str, Mapping[str, str]], list[Path]]:
    """Return recipe → id → answer of the model with a share of a task's update, and the files written."""
    context, paths = state.context, []
    answers: dict[str, Mapping[str, str]] = {}
    update = scale_deltas(load_deltas(state.path(index, DELTA)), factor)
    context.base.apply(state.method.combine([*state.deltas(index - 1), update]))
    folder = state.path(index, TRIALS) / f"{factor:g}"
    with context.zero.engaged(context.family.model):
        for _, task, _ in limits:
            path = folder / f"{file_name(task.name)}.jsonl"
            # The methods that can shrink answer with the model alone, as the base does.
            predict_whole(state, 0, task, path)
            answers[task.name] = read_predictions(path, task.test)
            paths.append(path)
    return answers, paths


def shrink(state: MethodState, index: int) -> Outcome:
    """Decide on the smaller update; the files of the whole one are moved when the journal says so.

    The journal's entry comes first, and `set_aside` moves them then, or at the next start after a kill.
    """
    return [], {SHRUNK: read_record(state.path(index, GUARD))["shrink"]["lambda"]}


def take_share(state: MethodState, index: int, factor: float) -> Outcome:
    """Write the share of its update that a task keeps, in the stage TRAINED."""
    delta, log, whole = state.path(index, DELTA), state.path(index, TRAIN), state.path(index, UNSHRUNK)
    if state.context.rank == 0:
        save_deltas(delta, scale_deltas(load_deltas(whole / DELTA), factor))
        write_json(log, read_record(whole / TRAIN) | {SHRUNK: factor})
    state.context.barrier()
    return [delta, log], {"steps": 0}


def cost_of_shrinking(state: MethodState, index: int) -> dict[str, Any]:
    """Return how λ was found and what it cost: limits and the task's own score with the whole update."""
    whole, name = state.path(index, UNSHRUNK), state.name(index)
    verdict = read_record(whole / GUARD)
    scores = {"whole": whole / SCORES, "shrunk": state.path(index, SCORES)}
    return verdict["shrink"] | {
        "scores": {key: read_record(path)[name]["score"] for key, path in scores.items()},
        "limits": [
            {key: record[key] for key in ("of", "task", "outcome", "limit", "change", "low", "high")}
            for record in verdict["limits"]
        ],
    }
