"""What a method asks for, as measured: numbers trained, bytes kept for every task, and time at test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_keeplora.journal import Journal
from llava_keeplora.report.results import Needs, Results, mean, spread
from llava_keeplora.run_folder import DELTA, JOURNAL, KEPT, STATE, Stage

NEEDS_COLUMNS = ("run", "trained per task", "kept per task (kB)", "extra time per image at test (ms)")
#: What goes from task to task: what a task changed, and what the method wants to know later.
KEPT = (DELTA, KEPT, STATE)


def read_needs(folder: Path) -> Needs:
    """What the folder of a method says."""
    entries = Journal(folder / JOURNAL).entries
    trained = [entry for entry in entries if entry.stage == Stage.TRAINED]
    tasks = [(folder / entry.file(DELTA)).parent for entry in trained]
    timed = [entry.info["test_seconds"] for entry in entries if "test_seconds" in entry.info]
    return Needs(
        mean(entry.info.get("trained_parameters") for entry in trained),
        mean(sum((task / name).stat().st_size for name in KEPT if (task / name).exists()) for task in tasks),
        timed[-1]["learned"] - timed[-1]["untouched"] if timed else None,
    )


def needs_rows(results: Results) -> list[list[str]]:
    """The table: one row per method that learns, mean ± sd over its seeds."""
    found = {
        name: [trial.needs for trial in trials if trial.needs and trial.needs.trained]
        for name, trials in results.items()
    }
    return [_row(name, needs) for name, needs in found.items() if needs]


def _row(name: str, needs: Sequence[Needs]) -> list[str]:
    times = [None if one.test_seconds is None else 1e3 * one.test_seconds for one in needs]
    return [
        name,
        spread([one.trained for one in needs], 0),
        spread([one.kept_bytes / 1e3 for one in needs]),
        spread(times, 2),
    ]
