"""The verdicts of a run's folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_keeplora.errors import RunError, nearest
from llava_keeplora.run_folder import ASIDE, GUARD, MATRIX, RETRIED, ROLLBACK, STOP, THEN, read_record
from llava_keeplora_eval import Matrix

#: Exit code of a command after a task that should not ship.
DONT_SHIP = 3
#: What followed from a verdict → what a table says of the row after the task.
MARKS = {ROLLBACK: "rolled back", STOP: "stopped"}


def read_verdicts(method: Path, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Return a method's verdicts in the order of the tasks, those of tasks that it rolled back included.

    A verdict on a task that was learned once more since then has the key `retried`, and no longer counts.

    Args:
        method: the method's folder.
        tasks: names of the run's tasks; verdicts on others come last.
    """
    paths = [*sorted(method.glob(f"{ASIDE}/*/{GUARD}")), *sorted(method.glob(f"task-*/{GUARD}"))]
    records = [record for path in paths if "limits" in (record := read_record(path))]
    last = {record["task"]: record for record in records}
    records = [r if last[r["task"]] is r else r | {RETRIED: True} for r in records]
    places = {task: place for place, task in enumerate(tasks)}
    return sorted(records, key=lambda record: places.get(record["task"], len(places)))


def read_marks(method: Path, tasks: Sequence[str]) -> dict[str, str]:
    """Return task → what a table says of its row: that it was rolled back, or that the method stopped there.

    Args:
        method: the method's folder.
        tasks: names of the run's tasks.
    """
    ends = {verdict["task"]: verdict.get(THEN) for verdict in counted(read_verdicts(method, tasks))}
    return {task: MARKS[then] for task, then in ends.items() if then in MARKS}


def counted(verdicts: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the verdicts that count: of a task that was tried more than once, the last one."""
    return (verdict for verdict in verdicts if RETRIED not in verdict)


def run_record(run: Path, labels: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
    """Return the content of the run's own record: every method's verdicts, and whether all of them ship."""
    methods = {label: verdicts for label in labels if (verdicts := read_verdicts(run / label, tasks))}
    ship = all(v["ship"] for verdicts in methods.values() for v in counted(verdicts))
    return {"ship": ship, "methods": methods}


def exit_code(run: str | Path, task: str | None = None) -> int:
    """Return 3 if a verdict of a run says not to ship, else 0; 0 for a run without a guard.

    Args:
        run: the run's folder.
        task: the task whose verdicts count; all when None.

    Raises:
        RunError: no method of the run has that task.
    """
    run = Path(run)
    if not (run / GUARD).exists():
        return 0
    methods = read_record(run / GUARD)["methods"].values()
    tasks = {name for path in run.glob(f"*/{MATRIX}") for name in Matrix.from_json(path).tasks}
    tasks |= {verdict["task"] for verdicts in methods for verdict in verdicts}
    if task is not None and task not in tasks:
        raise RunError(f"{run} has no task '{task}'", nearest(task, tasks))
    ships = [v["ship"] for verdicts in methods for v in counted(verdicts) if task in (None, v["task"])]
    return 0 if all(ships) else DONT_SHIP
