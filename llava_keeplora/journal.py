"""The append-only journal of one method's run, and the pure function that says what comes next."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from llava_keeplora.errors import RunError
from llava_keeplora.records import mismatches
from llava_keeplora.run_folder import BASE_STAGES, CONSOLIDATED, INFO, PLAN, SCORES, STAGES, Stage
from llava_keeplora_eval.files import file_hash
from llava_keeplora_eval.interruption import finishing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One finished stage.

    Args:
        task: 0 for the base, then 1, 2, ...
        stage: one of `STAGES`.
        seconds: what the stage took.
        files: path relative to the journal's folder → SHA-256.
        info: recipe version and data fingerprint, as the stage has them, and its peak of memory
            (`peak_bytes`, `peak_of`).
    """

    task: int
    stage: str
    seconds: float = 0.0
    files: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def file(self, kind: str) -> str:
        """The relative path of a file that the stage wrote, by its own name, such as scores.json.

        Raises:
            RunError: if there is none.
        """
        for name in self.files:
            if PurePosixPath(name).name == kind:
                return name
        raise RunError(
            f"the journal's stage {self.stage} of task {self.task} names no {kind}",
            "restore the journal or start over in a new output_dir",
        )


def _entry(values: Any) -> Entry:
    """A line's values as an entry.

    Raises:
        ValueError, TypeError: if they are no entry's.
    """
    entry = Entry(**values)
    types = {"task": int, "stage": str, "seconds": int | float, "files": dict, "info": dict}
    if isinstance(entry.task, bool) or not all(
        isinstance(getattr(entry, key), kind) for key, kind in types.items()
    ):
        raise ValueError("a value is of another type")
    for name, expected in entry.files.items():
        path = PurePosixPath(name)
        # A folder from elsewhere may name anything; what is read and copied is the method's own.
        if not isinstance(expected, str) or "\0" in name or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name!r} is no file of the run")
    for where, what in mismatches(entry.info, INFO):
        raise ValueError(f"info.{where} is {what}")
    return entry


def _reason(error: Exception) -> str:
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0][:120]


def stages_of(task: int) -> tuple[str, ...]:
    """The stages that a task goes through."""
    return STAGES if task else BASE_STAGES


def open_stages(entries: Sequence[Entry], tasks: int, learns: bool = True) -> list[tuple[int, str]]:
    """The stages that are still to run, in order, from the journal alone.

    A run with more tasks than it was planned for has been extended: it is planned again, and every stage is
    scored again, for the new columns. What was learned stays.

    Args:
        entries: the journal, oldest first.
        tasks: how many tasks the run has, not counting the base.
        learns: whether the method learns them; otherwise it is scored once, before the first.

    Raises:
        RunError: if the entries are not the beginning of a run's order.
    """
    order = [(task, stage) for task in range(tasks * learns + 1) for stage in stages_of(task)]
    done: dict[tuple[int, str], Entry] = {}
    for entry in entries:
        key = (entry.task, entry.stage)
        if key == PLAN and key in done and planned(entry) > planned(done[key]):
            done = _without_scores(done)
        elif key != next((open_one for open_one in order if open_one not in done), None):
            raise RunError("the journal's stages are out of order", "start over in a new output_dir")
        done[key] = entry
    if done and planned(done[PLAN]) < tasks:
        done = _without_scores(done)
        del done[PLAN]
    return [key for key in order if key not in done]


def _without_scores(done: Mapping[tuple[int, str], Entry]) -> dict[tuple[int, str], Entry]:
    return {key: entry for key, entry in done.items() if key[1] != Stage.EVALUATED}


def planned(plan: Entry) -> int:
    """How many tasks a run had when it was planned."""
    return len(plan.info.get("tasks", ()))


def next_stage(entries: Sequence[Entry], tasks: int, learns: bool = True) -> tuple[int, str] | None:
    """The stage to run next, (task, stage), or None when every task is closed; see `open_stages`."""
    return next(iter(open_stages(entries, tasks, learns)), None)


class Journal:
    """A JSONL file of finished stages; a torn last line is what a kill leaves; the next append cuts it off.

    Args:
        path: the file; made on the first append.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._whole = 0
        self.torn = False
        self.entries: list[Entry] = self._read()

    def _read(self) -> list[Entry]:
        if not self.path.exists():
            return []
        entries = []
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
            entries.append(entry)
            self._whole += len(line)
        return entries

    def forget(self) -> None:
        """Begin anew: the next append overwrites what is there."""
        self._whole, self.torn, self.entries = 0, False, []

    @property
    def has_work(self) -> bool:
        """Return whether a finished stage left more than a plan, a copied row, or an empty record."""
        return any(
            Path(name).name not in (SCORES, CONSOLIDATED) for entry in self.entries for name in entry.files
        )

    def append(self, entry: Entry) -> None:
        """Add a finished stage; on disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(entry), sort_keys=True).encode() + b"\n"
        with finishing(), open(self.path, "ab") as file:
            file.truncate(self._whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._whole += len(line)
        self.entries.append(entry)

    def verify(self, kinds: Container[str] | None = None) -> None:
        """Check the hash of every file that a finished stage wrote.

        Args:
            kinds: file names, such as scores.json, of those that are checked; all when None.

        Raises:
            RunError: naming the first file that is missing or changed.
        """
        for problem in self.problems(kinds):
            raise problem

    def problems(self, kinds: Container[str] | None = None) -> Iterator[RunError]:
        """What `verify` refuses, file by file; a file that was written again is what its last stage wrote."""
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
        """Relative path → the stage that wrote it and its hash.

        None for scores that an extension may have been making again when it was killed.
        """
        files: dict[str, tuple[Entry, str | None]] = {}
        for entry in self.entries:
            if (entry.task, entry.stage) == PLAN:
                files = {
                    name: (by, None if Path(name).name == SCORES else expected)
                    for name, (by, expected) in files.items()
                }
            files |= {name: (entry, expected) for name, expected in entry.files.items()}
        return files
