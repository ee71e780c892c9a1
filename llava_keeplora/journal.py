"""The append-only journal of one method's run, and the function that derives the open stages from it."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from llava_keeplora.errors import RunError
from llava_keeplora.records import mismatches
from llava_keeplora.run_folder import (
    AGAIN,
    BASE_STAGES,
    CONSOLIDATED,
    INFO,
    PLAN,
    PREDICTIONS,
    RETRIED,
    ROLLBACK,
    ROLLED_BACK,
    SCORES,
    SHRINK,
    SHRUNK,
    STAGES,
    THEN,
    UNSHRUNK,
    Stage,
)
from llava_keeplora_eval.files import file_hash
from llava_keeplora_eval.interruption import finishing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """Journal entry of one finished stage.

    Args:
        task: 0 for the base, then 1, 2, ...
        stage: one of `STAGES`.
        seconds: how long the stage took.
        files: path relative to the journal's folder → SHA-256.
        info: the stage's notes, such as data fingerprints or steps, and its peak memory (`peak_bytes`,
            `peak_of`).
    """

    task: int
    stage: str
    seconds: float = 0.0
    files: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def file(self, kind: str) -> str:
        """Return the relative path of a file that the stage wrote, given its name, such as scores.json.

        Raises:
            RunError: if the stage wrote no file of that name.
        """
        for name in self.files:
            if PurePosixPath(name).name == kind:
                return name
        raise RunError(
            f"the journal's stage {self.stage} of task {self.task} names no {kind}",
            "restore the journal or start over in a new output_dir",
        )


def _entry(values: Any) -> Entry:
    """Build an entry from the values of a line.

    Raises:
        ValueError, TypeError: if they are not those of an entry.
    """
    entry = Entry(**values)
    types = {"task": int, "stage": str, "seconds": int | float, "files": dict, "info": dict}
    if isinstance(entry.task, bool) or not all(
        isinstance(getattr(entry, key), kind) for key, kind in types.items()
    ):
        raise ValueError("a value is of another type")
    for stage, key in zip(OUTCOMES, (ROLLED_BACK, SHRUNK, RETRIED), strict=True):
        if (entry.stage == stage) != (key in entry.info):
            raise ValueError(f"a stage {stage} and its record belong together")
    for name, expected in entry.files.items():
        path = PurePosixPath(name)
        # A journal from elsewhere could name any path; only files in the method's folder are read and copied.
        if not isinstance(expected, str) or "\0" in name or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name!r} is no file of the run")
    for where, what in mismatches(entry.info, INFO):
        raise ValueError(f"info.{where} is {what}")
    return entry


def _planned_last(entry: Entry, task: str) -> Entry:
    """Return an entry; if it is a plan of the whole run, with a task at its end."""
    if (entry.task, entry.stage) != PLAN:
        return entry
    tasks = sorted(entry.info.get("tasks", ()), key=lambda record: record.get("task") == task)
    return replace(entry, info=entry.info | {"tasks": tasks})


def _reason(error: Exception) -> str:
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0][:120]


#: Stages that say what becomes of others; nothing of them is needed once a task is closed.
OUTCOMES = (Stage.ROLLED_BACK, Stage.SHRUNK, Stage.RETRIED)


def whole_place(name: str) -> str:
    """Return where a file of a task's whole update is kept, once the task has a smaller one."""
    folder, _, rest = name.partition("/")
    return f"{folder}/{UNSHRUNK}/{rest}"


def rolled_back(entries: Sequence[Entry]) -> list[str]:
    """Return the names of the tasks that a method has rolled back, in order."""
    return [entry.info[ROLLED_BACK]["task"] for entry in entries if entry.stage == Stage.ROLLED_BACK]


def learned_later(entries: Sequence[Entry]) -> set[int]:
    """Return the tasks after which nothing is scored, as a later one's training learns them too (`joint`)."""
    scored = {entry.task: entry for entry in entries if entry.task and entry.stage == Stage.EVALUATED}
    return {
        task
        for task, entry in scored.items()
        if not any(PurePosixPath(name).parent.name == PREDICTIONS for name in entry.files)
    }


def retried(entries: Sequence[Entry]) -> list[str]:
    """Return the names of the tasks that a method learns once more after a rollback, in order."""
    return [entry.info[RETRIED] for entry in entries if entry.stage == Stage.RETRIED]


def shrunk(entries: Sequence[Entry], task: int) -> float | None:
    """Return the share of its update that a task keeps; None for all of it."""
    factors = (entry.info[SHRUNK] for entry in entries if (entry.task, entry.stage) == (task, Stage.SHRUNK))
    return next(factors, None)


def stages_of(task: int, guarded: bool = False) -> tuple[Stage, ...]:
    """Return the stages of a task, in order."""
    stages = STAGES if task else BASE_STAGES
    return (*stages[:-1], Stage.GUARDED, stages[-1]) if guarded else stages


def open_stages(
    entries: Sequence[Entry], tasks: int, learns: bool = True, guarded: bool = False
) -> list[tuple[int, Stage]]:
    """Return the stages that are still to run, in order, from the journal alone.

    A run with more tasks than it was planned for has been extended: it is planned again, and every task is
    scored again for the new columns of the matrix. Trained tasks stay.

    Args:
        entries: the journal's entries, oldest first.
        tasks: number of tasks of the run, not counting the base.
        learns: whether the method is trained; otherwise it is only scored, as the base.
        guarded: whether the run has a guard.

    Raises:
        RunError: if the entries are not in the order of a run's stages.
    """
    order = [(task, stage) for task in range(tasks * learns + 1) for stage in stages_of(task, guarded)]
    done: dict[tuple[int, str], Entry] = {}
    left = deque(order)  # Those that are not done; a search after every entry would take entries × stages.
    for entry in entries:
        key = (entry.task, entry.stage)
        if entry.stage in OUTCOMES:
            continue  # The stages that it took back are gone; see `Journal.entries`.
        if key == PLAN and key in done and planned(entry) > planned(done[key]):
            done = _without_scores(done)
            left = deque(step for step in order if step not in done)
        elif not left or key != left.popleft():
            raise RunError("the journal's stages are out of order", "start over in a new output_dir")
        done[key] = entry
    if done and planned(done[PLAN]) < tasks:
        done = _without_scores(done)
        del done[PLAN]
    count = tasks * learns - len(rolled_back(entries))
    return [_closing(key, done) for key in order if key not in done and key[0] <= count]


def _closing(key: tuple[int, Stage], done: Mapping[tuple[int, str], Entry]) -> tuple[int, Stage]:
    """Return a stage, or ROLLED_BACK or SHRUNK in the place of CLOSED if the task's verdict says so."""
    verdict = done.get((key[0], Stage.GUARDED)) if key[1] == Stage.CLOSED else None
    instead = {ROLLBACK: Stage.ROLLED_BACK, SHRINK: Stage.SHRUNK}
    return (key[0], instead.get(verdict.info.get(THEN, ""), key[1])) if verdict else key


def _without_scores(done: Mapping[tuple[int, str], Entry]) -> dict[tuple[int, str], Entry]:
    return {key: entry for key, entry in done.items() if key[1] != Stage.EVALUATED}


def planned(plan: Entry) -> int:
    """Return how many tasks a run had when it was planned."""
    return len(plan.info.get("tasks", ()))


class Journal:
    """A JSONL file of finished stages.

    A killed process may leave an incomplete last line, which is ignored and overwritten by the next append.

    Args:
        path: the file; created by the first append.

    Raises:
        RunError: if a line before the last is not an entry.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._complete_bytes = 0
        self.torn = False
        #: The finished stages, oldest first; of a task that was rolled back, its ROLLED_BACK alone.
        self.entries: list[Entry] = []
        #: The stages of whole updates of tasks that have a smaller one now, with the places of their files.
        self.superseded: list[Entry] = []
        #: The stages of tasks that were rolled back, whose files are gone; for what they took.
        self.undone: list[Entry] = []
        self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                entry = _entry(json.loads(line))
            except (ValueError, TypeError, RecursionError) as error:
                if number < len(lines):
                    raise RunError(
                        f"{self.path}, line {number} is not a journal entry ({_reason(error)})",
                        "restore the file or start over in a new output_dir",
                    ) from error
                entry = None
            if entry is None or not line.endswith(b"\n"):
                logger.warning("%s: the last line is torn (a killed run); its stage runs again", self.path)
                self.torn = True
                break
            self.add(entry)
            self._complete_bytes += len(line)

    def forget(self) -> None:
        """Start over: the next append overwrites the file."""
        self._complete_bytes, self.torn = 0, False
        self.entries, self.superseded, self.undone = [], [], []

    @property
    def history(self) -> list[Entry]:
        """All that was done: the finished stages, after those of whole updates and of tasks rolled back."""
        return [*self.undone, *self.superseded, *self.entries]

    @property
    def has_work(self) -> bool:
        """Whether a finished stage left more than a plan, copied scores, or an empty record."""
        return any(
            Path(name).name not in (SCORES, CONSOLIDATED) for entry in self.entries for name in entry.files
        )

    def append(self, entry: Entry) -> None:
        """Append a finished stage; it is on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(entry), sort_keys=True).encode() + b"\n"
        with finishing(), open(self.path, "ab") as file:
            file.truncate(self._complete_bytes)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._complete_bytes += len(line)
        self.add(entry)

    def add(self, entry: Entry) -> None:
        """Add an entry that is in the file; one of `OUTCOMES` takes earlier ones of its task back."""

        def taken_back(old: Entry) -> bool:
            if entry.stage == Stage.RETRIED:
                return old.info.get(ROLLED_BACK, {}).get("task") == entry.info[RETRIED]
            stages = AGAIN if entry.stage == Stage.SHRUNK else tuple(Stage) if entry.stage in OUTCOMES else ()
            return old.task == entry.task and old.stage in stages and old.stage != Stage.ROLLED_BACK

        gone = [old for old in self.entries if taken_back(old)]
        if entry.stage == Stage.ROLLED_BACK:
            self.undone += [*(old for old in self.superseded if taken_back(old)), *gone]
        self.entries = [*(old for old in self.entries if not taken_back(old)), entry]
        self.superseded = [old for old in self.superseded if not taken_back(old)]
        if entry.stage == Stage.RETRIED:
            self.entries = [_planned_last(old, entry.info[RETRIED]) for old in self.entries]
        if entry.stage == Stage.SHRUNK:
            self.superseded += [
                replace(old, files={whole_place(name): expected for name, expected in old.files.items()})
                for old in gone
            ]

    def verify(self, kinds: Container[str] | None = None) -> None:
        """Check the hash of every file that a finished stage wrote.

        Args:
            kinds: names of the files to check, such as scores.json; all when None.

        Raises:
            RunError: naming the first file that is missing or changed.
        """
        for problem in self.problems(kinds):
            raise problem

    def problems(self, kinds: Container[str] | None = None) -> Iterator[RunError]:
        """Yield the errors of `verify`, file by file; a file written again must match its last stage."""
        for name, (entry, expected) in self.files().items():
            path = self.path.parent / name
            if kinds is not None and path.name not in kinds:
                continue
            if not path.is_file():
                yield RunError(
                    f"{path}, written by stage {entry.stage} of task {entry.task}, is missing",
                    "restore it or start over in a new output_dir",
                )
            elif expected is not None and file_hash(path) != expected:
                yield RunError(
                    f"{path} is not what stage {entry.stage} of task {entry.task} wrote",
                    "restore it or start over in a new output_dir",
                )

    def files(self) -> dict[str, tuple[Entry, str | None]]:
        """Return relative path → (the stage that wrote the file last, its hash).

        The hash is None for scores that an interrupted extension may have been writing again.
        """
        files: dict[str, tuple[Entry, str | None]] = {}
        for entry in [*self.entries, *self.superseded]:
            if (entry.task, entry.stage) == PLAN:
                files = {
                    name: (by, None if Path(name).name == SCORES else expected)
                    for name, (by, expected) in files.items()
                }
            files |= {name: (entry, expected) for name, expected in entry.files.items()}
        return files
