"""The schema of a run's folder, and of the base cache: names of files, stages, and the content of records.

This is the only module that spells them out.
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

#: Names of parts in configurations and runs of release 0.1.0 → their current names.
RENAMED_PARTS = {"projector": "connector"}
#: Of the run: its configuration, what its results depend on, the versions that began it, its results, the
#: folder of its users' recipes, and the lock that a running process holds.
CONFIG, IDENTITY, VERSIONS, RESULTS, RECIPES, LOCK = (
    "config.json",
    "identity.json",
    "versions.json",
    "results.json",
    "recipes",
    ".lock",
)
#: Of the run, for people: the report, its numbers as JSON, the tables as Markdown, LaTeX and CSV, and the
#: folder of exports.
REPORT, REPORT_JSON, TABLE, LATEX_TABLE, SUMMARY_TABLE, SCORES_TABLE, EXPORTS = (
    "report.html",
    "report.json",
    "table.md",
    "table.tex",
    "summary.csv",
    "scores.csv",
    "export",
)
#: Of the run: the scores of recipes that its guard watches.
WATCHED_TABLE = "watched.csv"
#: Of a run that was compared with published figures.
REPRODUCTION = "reproduction.json"
#: Of a table of `compare`, one row per order and run.
COMPARISON_TABLE, COMPARISON_JSON, TRIED = "table.csv", "table.json", "tried.json"
#: Of a method: its finished stages, and the accuracy matrix.
JOURNAL, MATRIX = "journal.jsonl", "matrix.json"
#: Of a task, records: initial adapters, log of training, protected subspace after the task, scores, and the
#: checkpoint within training.
PREPARED, TRAIN, CONSOLIDATED, SCORES, TRAINING = (
    "prepared.json",
    "train.json",
    "consolidated.json",
    "scores.json",
    "training.json",
)
#: Of a task: what the model itself answered to its training questions before it.
OWN_ANSWERS = "own_answers.jsonl"
#: Of a task, and of the run: the guard's verdict; of the base, the noise that it was measured against.
GUARD = "guard.json"
#: Of a task, a folder: its answers to the recipes that the guard watches; of a method: tasks rolled back.
WATCHED, ASIDE = "watched", "aside"
#: Of a task, folders: answers of smaller updates that the guard tried, and what came of the whole update.
TRIALS, UNSHRUNK = "trials", "unshrunk"
#: Of a task, tensors: initial adapters, update of the weights, the method's `extra_state` and `state_dict`.
#: An adopted task also has its update as it came.
ADAPTERS, ADOPTED, DELTA, KEPT, STATE = (
    "adapters.safetensors",
    "adopted.safetensors",
    "delta.safetensors",
    "kept.safetensors",
    "state.safetensors",
)
#: Of a task, folders: its answers, and the working folder of `transformers.Trainer`.
PREDICTIONS, TRAINER = "predictions", "trainer"
#: Of a task, all tensors of checkpoints within training; see `training_tensors`.
TRAINING_TENSORS = "training-*.safetensors"
#: Of an entry of the base cache: its record, and the answers of the untouched model; see also `cached_rows`.
CACHE_ENTRY, CACHED_PREDICTIONS = "entry.json", "predictions.jsonl"
#: Key in IDENTITY of the base model's content.
BASE = "base"
#: Keys in CONSOLIDATED: every layer's `Capacity`, and for how many more tasks it is estimated to suffice.
CAPACITY, FORECAST = "capacity", "forecast"
#: Key of a score in SCORES: what the answers were routed to, see `count_routes`; of methods that route.
ROUTES = "routes"
#: Key in CONSOLIDATED: the examples that a method keeps, by `ids`, and the `bytes` that they take.
EXAMPLES = "examples"
#: All files and folders of a run except those of its methods.
RUN_FILES = (
    CONFIG,
    IDENTITY,
    VERSIONS,
    RECIPES,
    RESULTS,
    REPORT,
    REPORT_JSON,
    TABLE,
    LATEX_TABLE,
    SUMMARY_TABLE,
    SCORES_TABLE,
    REPRODUCTION,
    EXPORTS,
    GUARD,
)


class Stage(StrEnum):
    """The stages of a task, in order."""

    PLANNED = "PLANNED"
    PREPARED = "PREPARED"
    TRAINED = "TRAINED"
    CONSOLIDATED = "CONSOLIDATED"
    EVALUATED = "EVALUATED"
    GUARDED = "GUARDED"
    CLOSED = "CLOSED"
    #: In the place of CLOSED: the task leaves the method's sequence, with all its stages.
    ROLLED_BACK = "ROLLED_BACK"
    #: In the place of CLOSED: the task's update gets smaller, and its stages from TRAINED on run again.
    SHRUNK = "SHRUNK"
    #: Of the base: a task that was rolled back comes to the end of the sequence, to be learned once more.
    RETRIED = "RETRIED"


#: The stages of a task of a run without a guard; see `llava_keeplora.journal.stages_of`.
STAGES = (
    Stage.PLANNED,
    Stage.PREPARED,
    Stage.TRAINED,
    Stage.CONSOLIDATED,
    Stage.EVALUATED,
    Stage.CLOSED,
)
#: The stages that run again for a smaller update.
AGAIN = (Stage.TRAINED, Stage.CONSOLIDATED, Stage.EVALUATED, Stage.GUARDED)
#: Task 0 is the base before any task: nothing is trained, its weights are analysed and its zero-shot scores
#: measured.
BASE_STAGES = (Stage.PLANNED, Stage.CONSOLIDATED, Stage.EVALUATED, Stage.CLOSED)
#: The plan of the whole run; the journal has one more entry of it for every time that the run was extended.
PLAN = (0, Stage.PLANNED)
#: Keys of an entry's `info`: what follows from the verdict, where a task that was rolled back is, the share
#: of its update that a task keeps, and the name of a task that is learned once more.
THEN, ROLLED_BACK, SHRUNK, RETRIED = "then", "rolled_back", "shrunk", "retried"
#: What happens after a task that breaks a limit of the guard, the value of THEN.
ROLLBACK, STOP, WARN, SHRINK = "rollback", "stop", "warn", "shrink"
#: Schema of a journal entry's `info`, as far as it is read; see `llava_keeplora.records.mismatches`.
INFO = {
    "tasks?": [{"task?": str}],
    "reference?": dict,
    "general?": dict,
    "seconds?": NUMBER,
    "taken_seconds?": NUMBER,
    "peak_bytes?": COUNT,
    "peak_of?": str,
    "steps?": COUNT,
    "trained_parameters?": COUNT,
    "training_examples?": COUNT,
    "examples?": Each(COUNT),
    "further_examples?": COUNT,
    "passes?": Each(COUNT),
    "task_id_at_test?": bool,
    "callbacks?": [str],
    "test_seconds?": {"untouched": NUMBER, "learned": NUMBER},
    "ship?": bool,
    f"{THEN}?": str,
    f"{ROLLED_BACK}?": {"task": str, "folder": str, "aside": str},
    f"{SHRUNK}?": Number(0),
    f"{RETRIED}?": str,
}
_METHOD = {"method": str, "options": dict, "parts": (Each(dict), None), "training": dict}
#: File name → schema. A key with `?` is optional, and keys that are not listed are allowed.
SCHEMAS: dict[str, Any] = {
    CONFIG: {
        "seed": COUNT,
        "model": {"name_or_path": str},
        "tasks": [str],
        "methods": Each(_METHOD),
        "parts": Each((dict, None)),
        "training": dict,
        "data": {"root": (str, None)},
        "evaluation": {"max_new_tokens": COUNT},
    },
    IDENTITY: {
        "seed": COUNT,
        "model": {"name_or_path": str},
        "tasks": [str],
        "methods": Each(_METHOD),
        "training": dict,
    },
    VERSIONS: Each(str),
    SCORES: Each({"score": NUMBER, "n?": COUNT, "errors?": Each(COUNT), "confusions?": [[(str, COUNT)]]}),
    PREPARED: {
        "layers": Each({"rank": COUNT, "alpha": NUMBER, "train_A": bool, "train_B?": bool}),
        "report": {"gradient?": Each({"captured?": ANY_NUMBER}), "left_out?": Each(str)},
    },
    TRAIN: {
        "history": [{"step?": NUMBER, "loss?": ANY_NUMBER}],
        "adopted?": {
            "source": str,
            "form": str,
            "removed": NUMBER,
            "protects": str,
            "parts": Each(NUMBER),
            "layers": Each(NUMBER),
            "before?": Each({"score": NUMBER}),
        },
    },
    CONSOLIDATED: {
        f"{CAPACITY}?": Each({"in": Number(1, whole=True), "k": COUNT, "part": str}),
        f"{FORECAST}?": Each({"tasks": (NUMBER, None), "left": NUMBER, "growth": NUMBER}),
        "energy_weight?": Each({"energy": NUMBER}),
        f"{EXAMPLES}?": {"ids": [str], "bytes": COUNT},
    },
    GUARD: {
        "ship?": bool,
        "limits?": [{"of": str, "task": str, "outcome": str, "limit": NUMBER, "change": NUMBER}],
        "noise?": Each({"points": NUMBER, "flips": COUNT}),
        "methods?": Each([dict]),
    },
    TRAINING: {"tensors": str, "sha256": Each(str), "values": dict, "record_sha256": str},
}


@dataclass(frozen=True)
class Capacity:
    """How much of one layer's input space is protected.

    Args:
        width: dimension of the layer's input; `in` in the record.
        protected: number of protected directions; `k` in the record.
        part: the part of the model that the layer belongs to.
    """

    width: int
    protected: int
    part: str

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Capacity:
        """Read a layer's entry under CAPACITY in a task's record."""
        return cls(record["in"], record["k"], record["part"])

    def to_dict(self) -> dict[str, Any]:
        """Return the entry that `from_dict` reads."""
        return {"in": self.width, "k": self.protected, "part": self.part}


def read_record(path: Path, cure: str = RESTORE) -> dict[str, Any]:
    """Read a JSON file of a run and check it against the schema of its name.

    Args:
        path: the file; its name is a key of `SCHEMAS`.
        cure: the advice of an error.

    Raises:
        RunError: if it cannot be read or does not follow the schema; names the place in the file.
    """
    content = read_object(path, cure)
    mistakes = itertools.chain(mismatches(content, SCHEMAS[path.name]), _missing_pairs(path.name, content))
    for where, what in mistakes:
        raise RunError(f"{path} is not what a run writes: {where or 'it'} is {what}", cure)
    return content


def _missing_pairs(name: str, content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield values whose companion is missing, as (dotted place of the companion, what is wrong).

    The record already follows its schema.
    """
    if name == CONSOLIDATED:
        for layer in content.get(FORECAST, {}).keys() - content.get(CAPACITY, {}).keys():
            yield f"{CAPACITY}.{layer[:80]}", f"missing, and {FORECAST} has it"
    if name == TRAIN:
        for index, record in enumerate(content["history"]):
            if "loss" in record and "step" not in record:
                yield f"history[{index}].step", "missing, and loss has it"
    if name == SCORES:
        for task, score in content.items():
            if "errors" in score and "n" not in score:
                yield f"{task[:80]}.n", "missing, and errors has it"
            for index, confusion in enumerate(score.get("confusions", ())):
                if list(map(type, confusion)) != [str, str, int]:
                    yield f"{task[:80]}.confusions[{index}]", "no class, prediction and number"


def record_digest(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record without its `record_sha256`, independent of the order of its keys."""
    content = json.loads(json.dumps({key: value for key, value in record.items() if key != "record_sha256"}))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_training(path: Path) -> dict[str, Any]:
    """Read a task's `training.json`, the record of its last checkpoint.

    The tensor files that it names are not checked here.

    Raises:
        RunError: if it cannot be read, does not follow its schema, or has been changed since it was written.
    """
    cure = "run the same command again: the task's training begins again"
    record = read_record(path, cure)
    if record_digest(record) != record["record_sha256"]:
        raise RunError(f"{path} has been changed since it was written: its values have another hash", cure)
    return record


def dump_config(config: Any) -> str:
    """Return the resolved configuration as JSON text, the content of CONFIG.

    `expected` and `base_cache`, on which no result depends, are left out.
    """
    # Absolute, so that recipes are found from any working directory.
    tasks = [str(Path(task).expanduser().absolute()) if is_file_name(task) else task for task in config.tasks]
    tree = dataclasses.asdict(config) | {"tasks": tasks}
    tree["adopted"] = [
        str(Path(source).expanduser().absolute()) if source and Path(source).expanduser().exists() else source
        for source in config.adopted
    ]
    del tree["expected"], tree["base_cache"]
    if config.guard is None:
        del tree["guard"]  # Runs without one have the file that they always had.
    else:
        for entry in tree["guard"]["watch"]:
            if is_file_name(entry["task"]):
                entry["task"] = str(Path(entry["task"]).expanduser().absolute())
    # In the order given: methods appear in tables as the user listed them.
    return json.dumps(tree, indent=2) + "\n"


def read_dumped(run: Path) -> dict[str, Any]:
    """Read the resolved configuration of a run folder; see `dump_config`.

    Raises:
        RunError: if it is not a run folder, or its configuration is damaged.
    """
    path = run / CONFIG
    if not path.is_file():
        raise RunError(f"{run} is not a run folder (it has no {CONFIG})", "name the output_dir of a run")
    return rename_parts(read_record(path))


def rename_parts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the current names of its parts; see `RENAMED_PARTS`."""
    tree = dict(tree)
    if isinstance(tree.get("parts"), Mapping):
        parts: dict[str, Any] = {}
        for name, value in tree["parts"].items():
            name = RENAMED_PARTS.get(name, name)
            both = isinstance(parts.get(name), Mapping) and isinstance(value, Mapping)
            parts[name] = {**parts[name], **value} if both else value
        tree["parts"] = parts
    if isinstance(tree.get("methods"), Mapping):
        tree["methods"] = {
            label: rename_parts(method) if isinstance(method, Mapping) else method
            for label, method in tree["methods"].items()
        }
    return tree


def kept_recipe(run: Path, name: str) -> Path:
    """Return the path of a run's copy of a user's recipe."""
    return run / RECIPES / f"{file_name(name)}.yaml"


def file_name(task: str) -> str:
    """Return a task's name in a form that can name a file or folder."""
    return task.replace("/", "-")


def task_folder(index: int, task: str) -> str:
    """Return the name of a task's folder in its method's folder; index 0 is that of the base."""
    return f"task-{index:02d}-{file_name(task)}"


def task_files(method: Path, name: str) -> list[Path]:
    """Return the files of one name, such as SCORES, of all tasks in a method's folder, the base's first."""
    return sorted(method.glob(f"task-*/{name}"))


def journal_files(run: Path) -> list[Path]:
    """Return the journals of all methods in a run's folder, by label."""
    return sorted(run.glob(f"*/{JOURNAL}"))


def result_files(method: Path) -> list[Path]:
    """Return all tensors and answers of the tasks in a method's folder."""
    patterns = ("*.safetensors", OWN_ANSWERS, f"{PREDICTIONS}/*.jsonl", f"{WATCHED}/*.jsonl")
    return sorted(path for pattern in patterns for path in method.glob(f"task-*/{pattern}"))


def training_tensors(step: int, rank: int | None = None) -> str:
    """Return the file name of a checkpoint's tensors: the common ones, or those of one process alone."""
    return f"training-{step}.safetensors" if rank is None else f"training-{step}-{rank}.safetensors"


def training_step(name: str) -> int:
    """Return the step in the name of a checkpoint's common tensors; the inverse of `training_tensors`."""
    return int(name.removeprefix("training-").removesuffix(".safetensors"))


def cached_rows(number: int) -> str:
    """Return the name of the file in a base cache's entry that holds one chunk of its rows."""
    return f"rows-{number:05d}.safetensors"


def differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the leaves in which two trees of plain data differ: (dotted key, old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new)):
            yield from differences(before, after, f"{where}[{index}]")
    elif old != new:
        yield where, old, new
