"""A run read back for export: the deltas of one method's tasks, and the base's published name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from llava_keeplora.adapters import BaseWeights, Delta, Deltas, FullDelta, load_deltas
from llava_keeplora.config import EvaluationConfig, ModelConfig, without_idle_options
from llava_keeplora.errors import ConfigError, RunError, nearest
from llava_keeplora.files import read_tensors
from llava_keeplora.journal import OUTCOMES, Entry, Journal, rolled_back
from llava_keeplora.methods import METHODS, Method
from llava_keeplora.models import ASSETS, Family, embedded_models, load_model
from llava_keeplora.models.layouts import part_of
from llava_keeplora.objects import Objects
from llava_keeplora.run_folder import DELTA, JOURNAL, KEPT, MATRIX, STATE, Stage, read_dumped
from llava_keeplora.saved_run import (
    base_content,
    base_record,
    check_base,
    locate_recipe,
    read_identity,
    recorded_base,
)
from llava_keeplora_eval import Matrix
from llava_keeplora_eval.checkpoints import loading
from llava_keeplora_eval.content import TENSORS, hub_commit, is_object
from llava_keeplora_eval.files import file_hash
from llava_keeplora_recipes import Recipe, load_recipe

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class LearnedRun:
    """One method of a run after some of its tasks.

    Args:
        run: the run folder.
        config: the run's resolved configuration.
        label: the method's label.
        entries: the method's journal up to the last of these tasks.
        deltas: each task's deltas, in order.
        objects: what the calling program gives instead of files.
    """

    run: Path
    config: Mapping[str, Any]
    label: str
    entries: Sequence[Entry]
    deltas: Sequence[Mapping[str, Delta | FullDelta]]
    objects: Objects = Objects()

    @property
    def model(self) -> ModelConfig:
        """Configuration of the base, in the dtype and quantization that the run trained on."""
        return ModelConfig(**self.config["model"])

    @cached_property
    def method(self) -> Method:
        """The method with its settings, without a state."""
        settings = self.config["methods"][self.label]
        cls = METHODS[settings["method"]]
        return cls(cls.Options(**without_idle_options(settings["method"], settings["options"])))

    @cached_property
    def recipes(self) -> list[Recipe]:
        """All tasks of the run, the learned ones first."""
        names = read_identity(self.run)["tasks"]
        tasks = [locate_recipe(self.run, *pair) for pair in zip(self.config["tasks"], names, strict=False)]
        return [self.objects.with_tables(load_recipe(tasks[place])) for place in self.places]

    @cached_property
    def places(self) -> list[int]:
        """The places in the configuration of the tasks that the method has not rolled back."""
        gone = rolled_back(Journal(self.run / self.label / JOURNAL).entries)
        names = read_identity(self.run)["tasks"]
        return [place for place, name in enumerate(names) if name not in gone]

    @cached_property
    def matrix(self) -> Matrix:
        """Accuracy matrix up to the last of these tasks."""
        matrix = Matrix.from_json(self.run / self.label / MATRIX)
        if len(self.places) == len(matrix.tasks):
            return Matrix(matrix.tasks, matrix.zero_shot, matrix.rows[: len(self.deltas)], matrix.of_bound)
        zero_shot, *rows = (
            row and [row[place] for place in self.places]
            for row in (matrix.zero_shot, *(matrix.rows[place] for place in self.places))
        )
        names = [matrix.tasks[place] for place in self.places]
        return Matrix(names, zero_shot, [row for row in rows if row][: len(self.deltas)], matrix.of_bound)

    def states(self) -> list[dict[str, Tensor]]:
        """Return what the method keeps of the base and of each task, in order.

        Raises:
            RunError: a file is damaged.
        """
        states: list[dict[str, Tensor]] = [{} for _ in range(len(self.deltas) + 1)]
        for entry in self.entries:
            for name, expected in entry.files.items():
                if PurePosixPath(name).name in (KEPT, STATE):
                    path = checked(self.run / self.label / name, expected, f"task {entry.task}")
                    states[entry.task] |= read_tensors(path)
        return states

    def base_record(self) -> dict[str, Any] | None:
        """Return the content of the base with which the run began; None if it is not recorded.

        Of a model of a program these are its tensors alone: other files may hold them.
        """
        recorded = recorded_base(self.run)
        if recorded is None or not is_object(recorded):
            return recorded
        record = base_record(self.model, base_content(self.model))
        return {key: record[key] for key in ("weights", TENSORS)}

    def load(
        self, dtype: str | None = None, deltas: Sequence[Mapping[str, Delta | FullDelta]] | None = None
    ) -> Family:
        """Load the model after these tasks.

        Args:
            dtype: a key of `DTYPES`, for an unquantised base; the run's dtype and quantization when None.
            deltas: what to add to the layers; what the method makes of the tasks' deltas when None.

        Raises:
            RunError: the base model is not what it was when the run began.
        """
        check_base(self.run, self.model)
        source = self.model if dtype is None else replace(self.model, dtype=dtype, quantization=None)
        family = load_model(source, EvaluationConfig(**self.config["evaluation"]))
        deltas = self.method.combine(self.deltas) if deltas is None else deltas
        for name in dict.fromkeys(name for task in deltas for name in task):
            # Layer by layer, because `BaseWeights` keeps a copy of what it changes.
            BaseWeights({name: family.model.get_submodule(name)}).apply(
                [{name: task[name]} for task in deltas if name in task]
            )
        return family


def load_learned_run(
    run: str | Path,
    label: str | None = None,
    at_task: int | None = None,
    objects: Objects = Objects(),
    base: str | None = None,
) -> LearnedRun:
    """Load what a method of a run learned; every file of deltas is checked by its hash.

    Args:
        run: the run folder.
        label: the method's label; None if the run has one method.
        at_task: the last task, counted from 1; the last finished one when None.
        objects: what the calling program gives instead of files.
        base: the folder of a copy of the run's base, where that is a model of a program.

    Raises:
        RunError: the folder is no run, it doesn't have the method, the task is not finished, the method has
            trained nothing yet, or a file is damaged.
    """
    run = Path(run)
    config = read_dumped(run)
    if base is not None:
        config["model"] |= {"name_or_path": base, "object": None}
    label = _chosen(config, run, label)
    journal = Journal(run / label / JOURNAL)
    finished = max((entry.task for entry in journal.entries if entry.stage == Stage.CLOSED), default=0)
    if not finished:
        raise RunError(f"{run / label} holds no finished task", "run its training first")
    last = finished if at_task is None else at_task
    if not 1 <= last <= finished:
        raise RunError(
            f"{run / label} has finished {finished} tasks, and task {last} is asked for",
            f"choose 1 to {finished} with --at-task",
        )
    entries = [e for e in journal.entries if e.task <= last and e.stage not in OUTCOMES]
    deltas = [_deltas(run / label, entry) for entry in entries if entry.stage == Stage.TRAINED]
    learned = LearnedRun(run, config, label, entries, deltas, objects)
    # The method last: reading it would ask for a plug-in where none is needed.
    if deltas and not deltas[-1] and learned.method.bound:
        raise RunError(
            f"'{label}' has learned nothing by task {last}, since it trains on all tasks with the last one",
            "let the run go on to its end" if last == finished else "leave --at-task out",
        )
    return learned


def _chosen(config: Mapping[str, Any], run: Path, label: str | None) -> str:
    labels = list(config["methods"])
    if label is None and len(labels) == 1:
        return labels[0]
    if label not in labels:
        what = f"has no method '{label}'" if label else f"has {len(labels)} methods"
        raise RunError(f"{run} {what}", f"choose one with --method: {', '.join(labels)}")
    return label


def _deltas(folder: Path, entry: Entry) -> dict[str, Delta | FullDelta]:
    name = entry.file(DELTA)
    return load_deltas(checked(folder / name, entry.files[name], f"task {entry.task}"))


def checked(path: Path, expected: str, writer: str) -> Path:
    """Return a file's path, after checking its hash.

    Args:
        path: the file.
        expected: its SHA-256 when it was written.
        writer: what wrote it, for the error.

    Raises:
        RunError: the file is missing or changed.
    """
    if not path.is_file() or file_hash(path) != expected:
        raise RunError(f"{path} is not what {writer} wrote", "restore it")
    return path


def filter_parts(
    learned: LearnedRun, parts: Sequence[str] | None, prefixes: Mapping[str, str]
) -> list[Deltas]:
    """Return each task's deltas on some parts of the model.

    Args:
        learned: the run up to the exported task.
        parts: names of parts; all that the method changes when None.
        prefixes: part → dotted prefix of its layers.

    Raises:
        ConfigError: the method did not change one of the parts.
    """
    if not parts:
        return list(learned.deltas)
    # A method that trains the whole model has no `parts`.
    changed = list(learned.config["methods"][learned.label]["parts"] or prefixes)
    for part in parts:
        if part not in changed:
            raise ConfigError(
                f"--parts names '{part}', which '{learned.label}' did not change", nearest(part, changed)
            )
    return [
        {name: delta for name, delta in task.items() if part_of(name, prefixes) in parts}
        for task in learned.deltas
    ]


@dataclass(frozen=True)
class Base:
    """The published base model, as users of an export load it.

    Args:
        id: its id on the Hub.
        revision: a commit on the Hub; None for the newest.
        local: the folder that the run loaded it from; None if that was the Hub.
        auto_class: name of the transformers class that loads it.
        opened_by: the keys `family` and `parts` of `ModelConfig`, where the run sets them.
        method: the method that learned on it, with the place of a plug-in; the state's when None.
    """

    id: str
    revision: str | None
    local: Path | None
    auto_class: str = "AutoModel"
    opened_by: Mapping[str, Any] = field(default_factory=dict)
    method: str | None = None


def published_base(model: ModelConfig, base_id: str | None, auto_class: str = "AutoModel") -> Base:
    """Return the published base of a run.

    Args:
        model: configuration of the run's base.
        base_id: `user/name` or `user/name@revision`, for a base that the run loaded from a folder.
        auto_class: name of the transformers class that loads it.

    Raises:
        ConfigError: the base is a folder and no id is given, or the id is not valid.
    """
    folder = find_local(model.name_or_path)
    given = {"family": model.family, "parts": model.parts and dict(model.parts)}
    opened_by = {key: value for key, value in given.items() if value}
    if base_id is not None:
        name, _, revision = base_id.partition("@")
        if not HUB_ID.fullmatch(name):
            raise ConfigError(
                f"--base-id is '{base_id}', which is no id on the Hub",
                "write user/name, or user/name@revision",
            )
        return Base(name, revision or None, folder, auto_class, opened_by)
    if folder is not None:
        raise ConfigError(
            f"the base of this run is '{model.name_or_path}', a folder of this machine, which nobody else "
            "can load",
            "give its id on the Hub with --base-id user/name",
        )
    with loading(model.name_or_path):
        commit = hub_commit(model.name_or_path, model.revision)
    return Base(model.name_or_path, commit, None, auto_class, opened_by)


def find_local(name_or_path: str) -> Path | None:
    """Return the folder of a base that is not on the Hub, embedded ones included; None for one that is."""
    path = ASSETS / name_or_path if name_or_path in embedded_models() else Path(name_or_path)
    return path.resolve() if path.exists() or not HUB_ID.fullmatch(name_or_path) else None
