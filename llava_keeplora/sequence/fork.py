"""A new run folder that holds the first tasks of another run, to be continued with other tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from llava_keeplora.config import RunConfig, make_method
from llava_keeplora.errors import RunError
from llava_keeplora.files import translate_errors, whole_folder, write_bytes, write_json
from llava_keeplora.journal import OUTCOMES, Entry, Journal, open_stages, rolled_back
from llava_keeplora.registries import METHODS
from llava_keeplora.run_folder import (
    BASE,
    JOURNAL,
    MATRIX,
    PLAN,
    PREDICTIONS,
    SCORES,
    VERSIONS,
    Stage,
    file_name,
    kept_recipe,
    read_record,
)
from llava_keeplora.saved_run import check_base_if_here, load_run, recorded_base, run_identity
from llava_keeplora.sequence.method_run import ZERO_SHOT
from llava_keeplora.sequence.workspace import Workspace
from llava_keeplora_eval import Matrix


def fork(run: str | Path, at_task: int, into: str | Path) -> RunConfig:
    """Copy a run's first tasks into a new run folder, as if the run had never had more.

    What was learned together with later tasks, as by `joint`, is left open, to be learned again without them.
    So is a bound where the methods have rolled tasks back, which it has learned.

    Args:
        run: the run folder; its first `at_task` tasks must be finished.
        at_task: how many tasks the new run has.
        into: a new or empty folder.

    Returns:
        the configuration of the new run.

    Raises:
        RunError: if the run has fewer finished tasks, one of their files is damaged, or `into` is not empty.
    """
    source, into = load_run(run), Path(into)
    old = Workspace(source)
    kept = _kept_places(source, old)
    if not kept:
        raise RunError(f"every task of {run} was rolled back", "fork a run that has kept one")
    if not 1 <= at_task <= len(kept):
        raise RunError(
            f"--at-task must be from 1 to {len(kept)}, the tasks of {run} (got {at_task})",
            f"choose one from 1 to {len(kept)} with --at-task",
        )
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise RunError(f"{into} exists already and is not an empty folder", "choose another one with --into")
    # A base that is not on this machine is checked when the new run goes on.
    check_base_if_here(run, source.model)
    config = dataclasses.replace(source.of_tasks(kept[:at_task]), output_dir=str(into))
    names, guarded = run_identity(config)["tasks"], source.guard is not None
    bounds = _bounds(source)
    # A bound has learned what the methods have rolled back, and begins anew.
    whole = len(kept) == len(source.tasks)
    copied = {label: method for label, method in source.methods.items() if whole or label not in bounds}
    journals = {
        label: _finished(old.label(label), at_task, len(kept), label != ZERO_SHOT, guarded)
        for label in (ZERO_SHOT, *copied)
    }
    for label, method in copied.items():
        if not make_method(method).scored(at_task, len(kept)):
            journals[label] = [entry for entry in journals[label] if entry.task < at_task]
    with translate_errors(into), whole_folder(into) as tmp_dir:
        new = Workspace(config, tmp_dir)
        for label, entries in journals.items():
            _copy(old.label(label), new.label(label), entries, names, label in bounds)
        for path in (old.root / VERSIONS, *(kept_recipe(old.root, name) for name in names)):
            if path.exists():
                write_bytes(tmp_dir / path.relative_to(old.root), path.read_bytes())
        # The base that the copied stages were computed on; the base's files may have changed since then.
        new.claim({BASE: recorded_base(old.root)})
    return config


def _bounds(source: RunConfig) -> set[str]:
    """Return the labels of the run's bounds, whose tasks no guard judges."""
    return {label for label, method in source.methods.items() if METHODS[method.method].bound}


def _kept_places(source: RunConfig, old: Workspace) -> list[int]:
    """Return the places of the tasks that the run's methods have not rolled back, counted from 0.

    Raises:
        RunError: the methods have rolled different tasks back.
    """
    names = run_identity(source)["tasks"]
    judged = source.methods.keys() - _bounds(source)
    gone = {label: rolled_back(Journal(old.label(label) / JOURNAL).entries) for label in judged}
    if len({frozenset(tasks) for tasks in gone.values()}) > 1:
        raise RunError(
            f"the methods of {source.output_dir} have rolled different tasks back",
            "fork runs of one method each",
        )
    return [i for i, name in enumerate(names) if not any(name in tasks for tasks in gone.values())]


def _finished(folder: Path, at_task: int, tasks: int, learns: bool, guarded: bool) -> list[Entry]:
    """Return the last journal entry of every stage of a method's first tasks, in order.

    Raises:
        RunError: if one of these stages has not finished.
    """
    entries = [e for e in Journal(folder / JOURNAL).entries if e.stage not in OUTCOMES]
    guarded = guarded and any(e.stage == Stage.GUARDED for e in entries)  # Bounds are not.
    stages = open_stages(entries, tasks, learns, guarded)
    missing = [(task, stage) for task, stage in stages if task <= at_task]
    if missing:
        raise RunError(
            f"{folder} has not finished stage {missing[0][1]} of task {missing[0][0]}",
            "let the run go on to its end first, or choose an earlier --at-task",
        )
    last = {(entry.task, entry.stage): entry for entry in entries}
    return [entry for (task, _), entry in last.items() if task <= at_task]


def _copy(source: Path, target: Path, entries: Sequence[Entry], names: Sequence[str], bound: bool) -> None:
    """Copy the files of some stages, leaving out what they hold of other tasks.

    The journal, which makes the copies count, is written last.
    """
    matrix, copied = Matrix(list(names), [None] * len(names), [], bound), []
    for entry in entries:
        files = {name: expected for name, expected in entry.files.items() if _kept(name, names)}
        for name, expected in files.items():
            _copy_file(source / name, target / name, expected)
        if entry.stage == Stage.EVALUATED:
            name = entry.file(SCORES)
            scores = {task: score for task, score in read_record(target / name).items() if task in names}
            files[name] = write_json(target / name, scores)
            for task, score in scores.items():
                matrix.set_cell(entry.task - 1 if entry.task else None, task, score["score"])
        info = (
            entry.info | {"tasks": [task for task in entry.info["tasks"] if task["task"] in names]}
            if (entry.task, entry.stage) == PLAN
            else entry.info
        )
        copied.append(dataclasses.replace(entry, files=files, info=info))
    matrix.to_json(target / MATRIX)
    journal = Journal(target / JOURNAL)
    for entry in copied:
        journal.append(entry)


def _kept(name: str, names: Sequence[str]) -> bool:
    path = Path(name)
    return path.parent.name != PREDICTIONS or path.stem in map(file_name, names)


def _copy_file(source: Path, target: Path, expected: str) -> None:
    if not source.is_file() or write_bytes(target, source.read_bytes()) != expected:
        raise RunError(
            f"{source} is missing or not what the run wrote",
            "restore it; `llava-keeplora doctor` lists everything that is damaged in a run",
        )
