"""The stages PREPARED and TRAINED of a task whose update was trained elsewhere.

PREPARED reads the update and writes it as it came, TRAINED writes what the method takes over of it: KeepLoRA
projects it off the protected subspace. Every other stage is that of a trained task.
"""

from __future__ import annotations

import shutil
from typing import Any

from llava_keeplora.adapters import (
    Deltas,
    load_deltas,
    removed_energy,
    save_deltas,
)
from llava_keeplora.adopt import Update, check_layers, check_unchanged
from llava_keeplora.errors import RunError
from llava_keeplora.files import write_json
from llava_keeplora.methods import Changed
from llava_keeplora.models.layouts import part_of
from llava_keeplora.run_folder import ADOPTED, DELTA, PREPARED, TRAIN, Stage, file_name, read_record
from llava_keeplora.sequence.answers import predict_whole
from llava_keeplora.sequence.method_state import MethodState, Outcome
from llava_keeplora.sequence.passes import task_context
from llava_keeplora_eval import score

#: Share of an update's energy below which its projection is rounding alone, and is not scored.
NOTHING = 1e-9
#: Folder of a task's answers with the update as it came, while the stage runs.
ANSWERS = "as-it-came"


def check_sources(state: MethodState) -> None:
    """Read the updates that are still to be taken over, so that a start is refused at once.

    Raises:
        RunError: if an update is damaged, of another base, or changes what the method does not train; or if
            it is no longer what a killed start has read.
    """
    for index in range(1, state.count + 1):
        if not state.source(index):
            continue
        done = {entry.stage for entry in state.journal.entries if entry.task == index}
        if Stage.PREPARED not in done:
            _, given = _read(state, index)
            if (index - 1, Stage.CLOSED) in {(entry.task, entry.stage) for entry in state.journal.entries}:
                state.load_method(index - 1, index)
                _project(state, index, given)
        elif not done & {Stage.TRAINED, Stage.SHRUNK}:
            recorded = read_record(state.path(index, PREPARED))["report"]["adopted"]
            check_unchanged(str(state.source(index)), recorded, state.name(index), state.folder)


def _read(state: MethodState, index: int) -> tuple[Update, Deltas]:
    """Return a task's update, and its deltas as the method takes them."""
    update = state.context.update(state.places[index - 1])
    return update, check_layers(update, state.config.label, Changed(state.layers, state.full))


def prepare(state: MethodState, index: int) -> Outcome:
    """Write a task's update as it came."""
    update, deltas = _read(state, index)
    record, tensors = state.path(index, PREPARED), state.path(index, ADOPTED)
    if state.context.rank == 0:
        save_deltas(tensors, deltas)
        report = {"adopted": update.source.record()}
        write_json(record, {"layers": {}, "unreachable": state.unreachable, "report": report})
    state.context.barrier()
    return [record, tensors], {"layers": len(deltas)}


def _project(state: MethodState, index: int, given: Deltas) -> Deltas:
    """Return what the method takes over of an update.

    Raises:
        RunError: if that is nothing.
    """
    taken = state.method.project(task_context(state, index, Stage.TRAINED), given)
    if not taken:
        raise RunError(
            f"nothing of {state.source(index)} is outside of what '{state.config.label}' protects",
            "adopt it into a new run with a lower energy_weight or energy_feature",
        )
    return taken


def take_over(state: MethodState, index: int) -> Outcome:
    """Write what the method takes over of a task's update, and what became of the rest."""
    state.begin(index)
    source = read_record(state.path(index, PREPARED))["report"]["adopted"]
    given = load_deltas(state.path(index, ADOPTED))
    taken = _project(state, index, given)
    parts = state.context.family.parts
    record = source | removed_energy(given, taken, lambda name: part_of(name, parts) or "the rest")
    record["protects"] = "features" if len(state.inputs[index - 1]) else "rows"
    if record["removed"] > NOTHING:
        record["before"] = _scores_before(state, index, given)
    delta_path, log_path = state.path(index, DELTA), state.path(index, TRAIN)
    if state.context.rank == 0:
        save_deltas(delta_path, taken)
        write_json(log_path, {"steps": 0, "history": [], "report": {}, "adopted": record})
        shutil.rmtree(state.path(index, ANSWERS), ignore_errors=True)
    state.context.barrier()
    return [delta_path, log_path], {"steps": 0}


def _scores_before(state: MethodState, index: int, given: Deltas) -> dict[str, Any]:
    """Return task → its score on the model with the update as it came."""
    context, scores = state.context, {}
    state.begin(index, given)
    with context.zero.engaged(context.family.model):
        for task in context.tasks:
            path = state.path(index, ANSWERS) / f"{file_name(task.name)}.jsonl"
            predict_whole(state, index, task, path)
            if context.rank == 0:
                scores[task.name] = score(task.test, path).to_dict()
    return scores
