"""Measured resources of a method: parameters trained, bytes kept per task, and time at test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_keeplora.journal import Journal
from llava_keeplora.report.results import Needs, Results, mean, spread
from llava_keeplora.run_folder import (
    CONSOLIDATED,
    DELTA,
    EXAMPLES,
    JOURNAL,
    KEPT,
    STATE,
    Stage,
    read_record,
    task_folder,
)

NEEDS_COLUMNS = ("run", "trained per task", "kept per task (kB)", "extra time per image at test (ms)")
#: Files that later tasks need: a task's update, and the state of the method.
KEPT_FILES = (DELTA, KEPT, STATE)


def read_needs(folder: Path) -> Needs:
    """Read the resources that a method took from its folder."""
    entries = Journal(folder / JOURNAL).entries
    trained = [entry for entry in entries if entry.stage == Stage.TRAINED]
    # With 0 parameters, another task's training is on this one's data as well.
    tasks = [
        (folder / entry.file(DELTA)).parent for entry in trained if entry.info.get("trained_parameters") != 0
    ]
    general = _example_bytes(folder / task_folder(0, "base")) / max(1, len(tasks))
    timed = [entry.info["test_seconds"] for entry in entries if "test_seconds" in entry.info]
    return Needs(
        # Of an adopted task nothing was trained here.
        mean(entry.info.get("trained_parameters") for entry in trained if entry.info.get("steps") != 0),
        mean(
            sum((task / name).stat().st_size for name in KEPT_FILES if (task / name).exists())
            + _example_bytes(task)
            + general
            for task in tasks
        ),
        timed[-1]["learned"] - timed[-1]["untouched"] if timed else None,
    )


def _example_bytes(task: Path) -> int:
    """Return the bytes of the examples that a method keeps of a task."""
    path = task / CONSOLIDATED
    return read_record(path).get(EXAMPLES, {}).get("bytes", 0) if path.exists() else 0


def needs_rows(results: Results) -> list[list[str]]:
    """Return the rows of the table: one per method that learns, mean ± sd over its seeds."""
    measured = {
        name: [trial.needs for trial in trials if trial.needs and trial.needs.trained]
        for name, trials in results.items()
    }
    return [_row(name, needs) for name, needs in measured.items() if needs]


def _row(name: str, needs: Sequence[Needs]) -> list[str]:
    times = [None if run.test_seconds is None else 1e3 * run.test_seconds for run in needs]
    return [
        name,
        spread([run.trained for run in needs], 0),
        spread([run.kept_bytes / 1e3 for run in needs]),
        spread(times, 2),
    ]
