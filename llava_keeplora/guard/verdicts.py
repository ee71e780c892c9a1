"""The verdicts of a run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_keeplora.run_folder import ASIDE, GUARD, read_record

#: Exit code of a command after a task that should not ship.
DONT_SHIP = 3


def read_verdicts(method: Path, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Return a method's verdicts in the order of the tasks, those of tasks that it rolled back included.

    Args:
        method: the method's folder.
        tasks: names of the run's tasks.
    """
    paths = [*method.glob(f"task-*/{GUARD}"), *sorted(method.glob(f"{ASIDE}/*/{GUARD}"))]
    records = [record for path in paths if "limits" in (record := read_record(path))]
    return sorted(records, key=lambda record: tasks.index(record["task"]))


def run_record(run: Path, labels: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
    """Return the content of the run's own record: every method's verdicts, and whether all of them ship."""
    methods = {label: verdicts for label in labels if (verdicts := read_verdicts(run / label, tasks))}
    return {"ship": all(v["ship"] for verdicts in methods.values() for v in verdicts), "methods": methods}


def exit_code(run: Path, task: str | None = None) -> int:
    """Return 3 if a verdict of a run says not to ship, else 0; 0 for a run without a guard.

    Args:
        run: the run's folder.
        task: the task whose verdicts count; all when None.
    """
    if not (run / GUARD).exists():
        return 0
    methods = read_record(run / GUARD)["methods"].values()
    counted = [v for verdicts in methods for v in verdicts if task in (None, v["task"])]
    return 0 if all(verdict["ship"] for verdict in counted) else DONT_SHIP
