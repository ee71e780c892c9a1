"""Measured resources of a method: what it trains, sees, keeps and needs, and its time at test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_keeplora.journal import Entry, Journal, learned_later, rolled_back
from llava_keeplora.report.results import Needs, Results, mean, spread
from llava_keeplora.run_folder import (
    CONSOLIDATED,
    DELTA,
    EXAMPLES,
    JOURNAL,
    KEPT,
    PLAN,
    STATE,
    Stage,
    read_record,
    task_folder,
)

NEEDS_COLUMNS = (
    "run",
    "trained per task",
    "kept per task (kB)",
    "extra time per image at test (ms)",
    "examples trained on",
    "training passes per task",
    "other passes per task",
    "needs",
)
#: Data of which a method trains on more than a task's own.
OLD, GENERAL = "old examples", "general data"
MIXED = {OLD, GENERAL}
#: Files that later tasks need: a task's update, and the state of the method.
KEPT_FILES = (DELTA, KEPT, STATE)
#: Numbers of training examples that differ by a smaller share are the same budget.
SAME_BUDGET = 0.01


def read_needs(folder: Path) -> Needs:
    """Read the resources that a method took from its folder."""
    journal = Journal(folder / JOURNAL)
    replaced = learned_later(journal.entries)
    # The training of an update that became smaller, or was taken back, took as much.
    entries = [
        replace(entry, info=entry.info | {"examples": {}, "steps": 0})
        if entry.stage == Stage.TRAINED and entry.task in replaced
        else entry
        for entry in journal.history
    ]
    # Of an adopted task nothing was trained here.
    trained = [entry for entry in entries if entry.stage == Stage.TRAINED]
    own = [entry for entry in trained if "trained_parameters" in entry.info]
    # A task without a training of its own is learned by another one's, whose files are for both, as are those
    # of the base.
    tasks = [entry for entry in journal.entries if entry.stage == Stage.TRAINED]
    kept = [(folder / entry.file(DELTA)).parent for entry in tasks if entry.task not in replaced]
    stored = sum(map(_stored_bytes, [folder / task_folder(0, "base"), *kept]))
    timed = [entry.info["test_seconds"] for entry in entries if "test_seconds" in entry.info]
    return Needs(
        mean(entry.info.get("trained_parameters") for entry in trained if entry.info.get("steps") != 0),
        stored / len(tasks) if tasks else None,
        timed[-1]["learned"] - timed[-1]["untouched"] if timed else None,
        *_read_passes(entries, own),
        _read_inputs(entries),
        any(entry.info.get("further_examples") for entry in own),
    )


def _stored_bytes(task: Path) -> int:
    """Return the bytes of what a method keeps of a task, or of the base: files, and examples in the data."""
    files = sum((task / name).stat().st_size for name in KEPT_FILES if (task / name).exists())
    path = task / CONSOLIDATED
    return files + (read_record(path).get(EXAMPLES, {}).get("bytes", 0) if path.exists() else 0)


def _planned_sizes(entries: Sequence[Entry]) -> list[int]:
    """Return the number of training examples of each task of the run, as it was planned last."""
    plans = [entry.info for entry in entries if (entry.task, entry.stage) == PLAN]
    return [task.get("train", {}).get("n", 0) for task in plans[-1].get("tasks", ())] if plans else []


def _read_passes(
    entries: Sequence[Entry], trained: Sequence[Entry]
) -> tuple[int | None, float | None, dict[str, float] | None]:
    """Return `examples`, `training_passes` and `other_passes`; None for runs that didn't record them."""
    sizes = _planned_sizes(entries)
    if not trained or not all("examples" in entry.info for entry in trained):
        return None, None, None
    # A second training after a task is on examples as well.
    examples = sum(sum(entry.info.get("examples", {}).values()) for entry in entries)
    # Of an image with several captions, each is one to learn.
    own = sum(entry.info.get("training_examples", sizes[entry.task - 1]) for entry in trained)
    if not own:
        return examples, None, None
    others: Counter[str] = Counter()
    for entry in entries:
        others.update(entry.info.get("passes", {}))
    return examples, examples / own, {kind: count / own for kind, count in sorted(others.items())}


def _read_inputs(entries: Sequence[Entry]) -> tuple[str, ...] | None:
    """Return what a finished method needs beyond each task's own data."""
    last = len(_planned_sizes(entries)) - len(rolled_back(entries))
    closed = [entry.info for entry in entries if (entry.task, entry.stage) == (last, Stage.CLOSED)]
    if not closed or "task_id_at_test" not in closed[-1]:
        return None
    plan = [entry.info for entry in entries if entry.stage == Stage.PLANNED]
    old = any(
        source not in ("0", str(entry.task)) for entry in entries for source in entry.info.get("examples", ())
    )
    inputs = {
        "task at test": closed[-1]["task_id_at_test"],
        OLD: old,
        "reference data": any("reference" in info for info in plan),
        GENERAL: any("general" in info for info in plan),
    }
    return tuple(name for name, needed in inputs.items() if needed)


def _measured(results: Results) -> dict[str, list[Needs]]:
    """Return name → resources of its trials, for methods that learn."""
    measured = {
        name: [trial.needs for trial in trials if trial.needs and trial.needs.trained]
        for name, trials in results.items()
    }
    return {name: needs for name, needs in measured.items() if needs}


def usual_budget(counts: Mapping[str, float], own: Collection[str]) -> float:
    """Return the number of training examples that most rows have; that of the first of several such.

    Args:
        counts: row → its number.
        own: rows that train on each task's own examples alone. Others count only where there are none of
            these, so that a replay is the row that differs from them.
    """
    numbers = [count for row, count in counts.items() if row in own] or list(counts.values())
    return Counter(numbers).most_common(1)[0][0]


def other_budget(count: float, usual: float) -> bool:
    """Return whether a number of training examples is another budget than the usual one."""
    return abs(count - usual) > SAME_BUDGET * usual


def budget_factors(results: Results) -> dict[str, float]:
    """Return name → examples trained on over those of most methods, for finished ones with another number."""
    measured = _measured(results)
    counts = {
        name: count
        for name, needs in measured.items()
        if all(run.inputs is not None for run in needs)
        and (count := mean(run.examples for run in needs)) is not None
    }
    own = [
        name
        for name in counts
        if not any(run.further or MIXED & set(run.inputs or ()) for run in measured[name])
    ]
    usual = usual_budget(counts, own) if counts else 0
    return {name: count / usual for name, count in counts.items() if usual and other_budget(count, usual)}


def budget_note(results: Results) -> str:
    """Return a sentence on the methods that trained on another number of examples; empty if there is none."""
    factors = budget_factors(results)
    listed = ", ".join(f"{name} ({factor:.2f} times)" for name, factor in factors.items())
    return f"Trained on another number of examples than the others: {listed}." if factors else ""


def needs_rows(results: Results) -> list[list[str]]:
    """Return the rows of the table: one per method that learns, mean ± sd over its seeds."""
    factors = budget_factors(results)
    return [_row(name, needs, factors.get(name)) for name, needs in _measured(results).items()]


def _row(name: str, needs: Sequence[Needs], factor: float | None) -> list[str]:
    times = [None if run.test_seconds is None else 1e3 * run.test_seconds for run in needs]
    inputs = _inputs(needs)
    return [
        name,
        spread([run.trained for run in needs], 0),
        spread([run.kept_bytes / 1e3 for run in needs]),
        spread(times, 2),
        spread([run.examples for run in needs], 0) + (f" ({factor:.2f} ×)" if factor else ""),
        spread([run.training_passes for run in needs], 2),
        spread([_sum(run.other_passes) for run in needs], 2),
        spread([None]) if inputs is None else ", ".join(inputs) or "nothing",
    ]


def _inputs(needs: Sequence[Needs]) -> list[str] | None:
    """Return what any of a method's runs needs; None where one is not finished."""
    if any(run.inputs is None for run in needs):
        return None
    return list(dict.fromkeys(name for run in needs for name in run.inputs or ()))


def _sum(passes: Mapping[str, float] | None) -> float | None:
    return None if passes is None else sum(passes.values())


#: Column of a table of numbers → the number of one run.
NUMBERS: dict[str, Callable[[Needs], float | None]] = {
    "trained_parameters": lambda run: run.trained,
    "kept_bytes": lambda run: run.kept_bytes,
    "extra_test_seconds": lambda run: run.test_seconds,
    "examples": lambda run: run.examples,
    "training_passes": lambda run: run.training_passes,
    "other_passes": lambda run: _sum(run.other_passes),
}
NUMBER_COLUMNS = (*NUMBERS, "needs")


def needs_numbers(results: Results) -> dict[str, list[Any]]:
    """Return name → the values of `NUMBER_COLUMNS`, means over its seeds, unrounded; None where missing."""
    rows: dict[str, list[Any]] = {}
    for name, needs in _measured(results).items():
        inputs = _inputs(needs)
        rows[name] = [mean(map(number, needs)) for number in NUMBERS.values()]
        rows[name].append(None if inputs is None else ", ".join(inputs))
    return rows


def passes_by_kind(results: Results) -> dict[str, dict[str, float] | None]:
    """Return name → kind → other passes per task, means over its seeds; None where they are missing."""
    kinds: dict[str, dict[str, float] | None] = {}
    for name, needs in _measured(results).items():
        passes = [run.other_passes for run in needs if run.other_passes is not None]
        complete = len(passes) == len(needs)
        kinds[name] = (
            {
                kind: sum(run.get(kind, 0.0) for run in passes) / len(passes)
                for kind in sorted({kind for run in passes for kind in run})
            }
            if complete
            else None
        )
    return kinds
