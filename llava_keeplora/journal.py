"""The append-only journal of one method's run, and the pure function that says what comes next."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava_keeplora.errors import RunError
from llava_keeplora.files import file_hash
from llava_keeplora_eval.interruption import finishing

logger = logging.getLogger(__name__)

STAGES = ("PLANNED", "PREPARED", "TRAINED", "CONSOLIDATED", "EVALUATED", "CLOSED")
#: Task 0 is the base before any task: nothing is trained, its weights are analysed and its zero-shot row taken.
BASE_STAGES = ("PLANNED", "CONSOLIDATED", "EVALUATED", "CLOSED")


@dataclass(frozen=True)
class Entry:
    """One finished stage.

    Args:
        task: 0 for the base, then 1, 2, ...
        stage: one of `STAGES`.
        seconds: what the stage took.
        files: path relative to the journal's folder → SHA-256.
        info: recipe version and data fingerprint, as the stage has them, and its peak of memory (`peak_bytes`, `peak_of`).
    """

    task: int
    stage: str
    seconds: float = 0.0
    files: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


def stages_of(task: int) -> tuple[str, ...]:
    """The stages that a task goes through."""
    return STAGES if task else BASE_STAGES


def next_stage(entries: Sequence[Entry], tasks: int) -> tuple[int, str] | None:
    """The stage to run next, from the journal alone.

    Args:
        entries: the journal, oldest first.
        tasks: how many tasks the run has, not counting the base.

    Returns:
        (task, stage), or None when every task is closed.

    Raises:
        RunError: if the entries are not the beginning of a run's order.
    """
    order = [(task, stage) for task in range(tasks + 1) for stage in stages_of(task)]
    done = [(entry.task, entry.stage) for entry in entries]
    if done != order[: len(done)]:
        raise RunError("the journal's stages are out of order", "start over in a new output_dir")
    return order[len(done)] if len(done) < len(order) else None


class Journal:
    """A JSONL file of finished stages; a torn last line is what a kill leaves; the next append cuts it off.

    Args:
        path: the file; made on the first append.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._whole = 0
        self.entries: list[Entry] = self._read()

    def _read(self) -> list[Entry]:
        if not self.path.exists():
            return []
        entries = []
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError) as error:
                if number < len(lines):
                    raise RunError(f"{self.path}, line {number} is not a journal entry", "restore the file or start over in a new output_dir") from error
                entry = None
            if entry is None or not line.endswith(b"\n"):
                logger.warning("%s: the last line is torn (a killed run); its stage runs again", self.path)
                break
            entries.append(entry)
            self._whole += len(line)
        return entries

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

    def verify(self) -> None:
        """Check the hash of every file that a finished stage wrote.

        Raises:
            RunError: naming the first file that is missing or changed.
        """
        for entry in self.entries:
            for name, expected in entry.files.items():
                path = self.path.parent / name
                if not path.is_file():
                    raise RunError(f"{path}, written by stage {entry.stage} of task {entry.task}, is missing", "restore it or start over in a new output_dir")
                if file_hash(path) != expected:
                    raise RunError(f"{path} is not what stage {entry.stage} of task {entry.task} wrote", "restore it or start over in a new output_dir")
