"""The schema of a run's folder: names of its files, stages, and what each record holds.

Nothing else spells them out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from llava_keeplora.errors import RunError
from llava_keeplora.records import ANY_NUMBER, COUNT, NUMBER, RESTORE, Each, Number, mismatches, read_object
from llava_keeplora_recipes.strict_yaml import is_file_name

#: Of the run: its configuration, what its results depend on, the versions that began it, and its results.
CONFIG, IDENTITY, VERSIONS, RESULTS, RECIPES = (
    "config.json",
    "identity.json",
    "versions.json",
    "results.json",
    "recipes",
)
#: Of a method: its finished stages, and the accuracy matrix.
JOURNAL, MATRIX = "journal.jsonl", "matrix.json"
#: Of a task, records: how adapters start, the log of training, what is protected afterwards, the scores, a
#: checkpoint within training.
PREPARED, TRAIN, CONSOLIDATED, SCORES, TRAINING = (
    "prepared.json",
    "train.json",
    "consolidated.json",
    "scores.json",
    "training.json",
)
#: Of a task, tensors: where its adapters start, its update, what training keeps for later, what it adds to
#: the protected subspace.
ADAPTERS, DELTA, KEPT, STATE = (
    "adapters.safetensors",
    "delta.safetensors",
    "kept.safetensors",
    "state.safetensors",
)
#: Of a task, a folder of answers.
PREDICTIONS = "predictions"
#: In IDENTITY: what the base model is by content.
BASE = "base"
RUN_FILES = (
    "config.json",
    "identity.json",
    "versions.json",
    "recipes",
    "results.json",
    "report.html",
    "table.md",
    "table.tex",
    "summary.csv",
    "scores.csv",
    "export",
)


class Stage(StrEnum):
    """What a task goes through, in order."""

    PLANNED = "PLANNED"
    PREPARED = "PREPARED"
    TRAINED = "TRAINED"
    CONSOLIDATED = "CONSOLIDATED"
    EVALUATED = "EVALUATED"
    CLOSED = "CLOSED"


STAGES = tuple(Stage)
#: Task 0 is the base before any task: nothing is trained, its weights are analysed and its zero-shot row
#: taken.
BASE_STAGES = (Stage.PLANNED, Stage.CONSOLIDATED, Stage.EVALUATED, Stage.CLOSED)
#: The plan of the whole run; it stands in the journal once more for every time that the run was extended.
PLAN = (0, Stage.PLANNED)
#: What readers take out of a stage's `info`; see `llava_keeplora.records`.
INFO = {
    "tasks?": [{"task?": str}],
    "reference?": dict,
    "seconds?": NUMBER,
    "taken_seconds?": NUMBER,
    "peak_bytes?": COUNT,
    "peak_of?": str,
    "steps?": COUNT,
    "trained_parameters?": COUNT,
    "test_seconds?": {"untouched": NUMBER, "learned": NUMBER},
}
_METHOD = {"method": str, "options": dict, "parts": (Each(dict), None), "training": dict}
#: File name → schema. A key with `?` may be missing, and others may stand beside those named.
SCHEMAS: dict[str, Any] = {
    "config.json": {
        "seed": COUNT,
        "model": {"name_or_path": str},
        "tasks": [str],
        "methods": Each(_METHOD),
        "parts": Each((dict, None)),
        "training": dict,
        "data": {"root": (str, None)},
        "evaluation": {"max_new_tokens": COUNT},
    },
    "identity.json": {
        "seed": COUNT,
        "model": {"name_or_path": str},
        "tasks": [str],
        "methods": Each(_METHOD),
        "training": dict,
    },
    "versions.json": Each(str),
    "scores.json": Each({"score": NUMBER}),
    "prepared.json": {
        "layers": Each({"rank": COUNT, "alpha": NUMBER, "train_A": bool}),
        "report": {"gradient?": Each({"captured?": ANY_NUMBER}), "left_out?": Each(str)},
    },
    "train.json": {"history": [{"step?": NUMBER, "loss?": ANY_NUMBER}]},
    "consolidated.json": {
        "capacity?": Each({"in": Number(1, whole=True), "k": COUNT, "part": str}),
        "forecast?": Each({"tasks": (NUMBER, None), "left": NUMBER, "growth": NUMBER}),
        "energy_weight?": Each({"energy": NUMBER}),
    },
    "training.json": {"tensors": str, "sha256": Each(str), "values": dict, "record_sha256": str},
}


@dataclass(frozen=True)
class Capacity:
    """How much of one layer's input space is protected.

    Args:
        width: of the layer's input, `in`.
        protected: directions of it that are protected, `k`.
        part: of the model.
    """

    width: int
    protected: int
    part: str

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Capacity:
        """Read a layer's entry under `capacity` in a task's record."""
        return cls(record["in"], record["k"], record["part"])

    def to_dict(self) -> dict[str, Any]:
        """Return the entry that `from_dict` reads."""
        return {"in": self.width, "k": self.protected, "part": self.part}


def read_record(path: Path, cure: str = RESTORE) -> dict[str, Any]:
    """A JSON file of a run, by the schema of its name.

    Args:
        path: the file; its name is a key of `SCHEMAS`.
        cure: what an error advises.

    Raises:
        RunError: if it cannot be read, or holds something else; with the place in it.
    """
    content = read_object(path, cure)
    for where, what in itertools.chain(mismatches(content, SCHEMAS[path.name]), _halves(path.name, content)):
        raise RunError(f"{path} is not what a run writes: {where or 'it'} is {what}", cure)
    return content


def _halves(name: str, content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a record holds without what goes with it: (dotted place, what is missing).

    Its schema is followed.
    """
    if name == "consolidated.json":
        for layer in content.get("forecast", {}).keys() - content.get("capacity", {}).keys():
            yield f"capacity.{layer[:80]}", "missing, and forecast has it"
    if name == "train.json":
        for index, record in enumerate(content["history"]):
            if "loss" in record and "step" not in record:
                yield f"history[{index}].step", "missing, and loss has it"


def record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of what a record says but for its own `record_sha256`, whatever the order of its keys."""
    content = json.loads(json.dumps({key: value for key, value in record.items() if key != "record_sha256"}))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_training(path: Path) -> dict[str, Any]:
    """A task's `training.json`, the record of its last checkpoint.

    The tensors that it names are checked by their reader.

    Raises:
        RunError: if its values are not those that were written.
    """
    cure = "run the same command again: the task's training begins again"
    record = read_record(path, cure)
    if record_digest(record) != record["record_sha256"]:
        raise RunError(f"{path} is not what was written: its values have another hash", cure)
    return record


def dump_config(config: Any) -> str:
    """The resolved configuration as JSON text, as the run folder keeps it.

    What was published, or is found elsewhere, is no part of a run.
    """
    # Recipes are found from any working directory.
    tasks = [str(Path(task).expanduser().absolute()) if is_file_name(task) else task for task in config.tasks]
    tree = dataclasses.asdict(config) | {"tasks": tasks}
    del tree["expected"], tree["base_cache"]
    # In the order given: methods appear in tables as the user listed them.
    return json.dumps(tree, indent=2) + "\n"


def read_dumped(run: Path) -> dict[str, Any]:
    """The resolved configuration that a run folder keeps; see `dump_config`.

    Raises:
        RunError: if the folder is no run's, or its configuration was damaged.
    """
    path = run / "config.json"
    if not path.is_file():
        raise RunError(f"{run} is not a run folder (it has no config.json)", "name the output_dir of a run")
    return read_record(path)


def kept_recipe(run: Path, name: str) -> Path:
    """Where a run keeps the recipe of a user's task."""
    return run / "recipes" / f"{file_name(name)}.yaml"


def file_name(task: str) -> str:
    """A task's name as one of a file or folder."""
    return task.replace("/", "-")


def differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves in which two trees of plain data differ: (dotted key, old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new)):
            yield from differences(before, after, f"{where}[{index}]")
    elif old != new:
        yield where, old, new
