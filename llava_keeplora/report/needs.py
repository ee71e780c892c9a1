"""What a method asks for, as measured: numbers trained, bytes kept for every task, and time at test."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llava_keeplora.journal import SCORES, Journal
from llava_keeplora.report.trial import Needs, Results, mean, spread

NEEDS_COLUMNS = ("run", "trained per task", "kept per task (kB)", "extra time per image at test (ms)")
#: What goes from task to task: what a task changed, and what the method wants to know later.
KEPT = ("delta.safetensors", "kept.safetensors", "state.safetensors")


def read_needs(folder: Path, baseline: Path) -> Needs:
    """What the folder of a method says.

    Args:
        folder: the method's.
        baseline: the untouched model's.
    """
    entries = Journal(folder / "journal.jsonl").entries
    trained = [entry for entry in entries if entry.stage == "TRAINED"]
    tasks = [folder / Path(next(iter(entry.files))).parent for entry in trained]
    own, untouched = seconds_per_example(folder), seconds_per_example(baseline)
    return Needs(
        mean(entry.info.get("trained_parameters") for entry in trained),
        mean(sum((task / name).stat().st_size for name in KEPT if (task / name).exists()) for task in tasks),
        None if own is None or untouched is None else own - untouched,
    )


def seconds_per_example(folder: Path) -> float | None:
    """Seconds that an example took in a method's evaluations: those that answered every task, in one go."""
    evaluated = [entry for entry in Journal(folder / "journal.jsonl").entries if entry.stage == "EVALUATED"]
    # The base's scores are copied, and for a run that was extended a stage answers the new task alone.
    times = Counter(entry.task for entry in evaluated)
    seconds = examples = 0
    for entry in evaluated:
        if times[entry.task] == 1 and len(entry.files) > 1:
            path = next(folder / name for name in entry.files if name.endswith(SCORES))
            # Answers of the untouched model may be another run's, as is the time that they took.
            seconds += entry.seconds + entry.info.get("taken_seconds", 0.0)
            examples += sum(score["n"] for score in json.loads(path.read_text()).values())
    return seconds / examples if examples else None


def needs_rows(results: Results) -> list[list[str]]:
    """The table: one row per method that learns, mean ± sd over its seeds."""
    found = {name: [trial.needs for trial in trials if trial.needs and trial.needs.trained] for name, trials in results.items()}
    return [_row(name, needs) for name, needs in found.items() if needs]


def _row(name: str, needs: Sequence[Needs]) -> list[str]:
    times = [None if one.test_seconds is None else 1e3 * one.test_seconds for one in needs]
    return [name, spread([one.trained for one in needs], 0), spread([one.kept_bytes / 1e3 for one in needs]), spread(times, 2)]
