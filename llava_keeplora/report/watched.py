"""General ability: the scores of recipes that a run's guard watches, apart from the tasks' columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_keeplora.guard import WATCH, read_verdicts
from llava_keeplora.guard.verdicts import counted
from llava_keeplora.report.results import Results, Trial, mean, spread
from llava_keeplora.run_folder import ROLLBACK, THEN
from llava_keeplora_eval.matrix import ZERO_SHOT

#: What the tables are of.
TITLE = "General ability"
NOTE = (
    "Score in percent on recipes that the guard watches and nothing is trained on: before the first task, "
    "after the last one, and the change in points."
)


def read_watched(folder: Path, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return stage → watched recipe → score in percent, from a method's verdicts.

    The stages are the base, `zero-shot`, and then each task; after a task that was rolled back the model is
    the one before it. Empty without a guard that watches recipes.

    Args:
        folder: the method's folder.
        tasks: names of the run's tasks, in order.
    """
    verdicts = read_verdicts(folder, tasks)
    if not any(record["of"] == WATCH for verdict in verdicts for record in verdict["limits"]):
        return {}
    kept = {verdict["task"]: verdict for verdict in counted(verdicts) if verdict.get(THEN) != ROLLBACK}
    row = _scores(verdicts[0], "before")
    stages = {ZERO_SHOT: row}
    for task in dict.fromkeys(verdict["task"] for verdict in verdicts):
        row = _scores(kept[task], "after") if task in kept else row
        stages[task] = row
    return stages


def watched_examples(run: Path, labels: Sequence[str], tasks: Sequence[str]) -> dict[str, tuple]:
    """Return watched recipe → fingerprint of its examples, of a run's methods."""
    return {
        f"{record['task']} (watched)": (record["fingerprint"],)
        for label in labels
        for verdict in read_verdicts(run / label, tasks)
        for record in verdict["limits"]
        if record["of"] == WATCH
    }


def _scores(verdict: Mapping[str, Any], when: str) -> dict[str, float]:
    return {record["task"]: record[when] for record in verdict["limits"] if record["of"] == WATCH}


def watched_names(results: Results) -> list[str]:
    """Return the recipes that any of the results has watched."""
    stages = (trial.watched.get(ZERO_SHOT, {}) for trials in results.values() for trial in trials)
    return list(dict.fromkeys(name for scores in stages for name in scores))


def before_and_after(trial: Trial, name: str) -> tuple[float | None, float | None, float | None]:
    """Return a watched recipe's score before the first task, after the last one, and the change in points."""
    stages = list(trial.watched.values())
    if not stages or name not in stages[0] or name not in stages[-1]:
        return None, None, None
    before, after = stages[0][name], stages[-1][name]
    return before, after, after - before


def watched_header(results: Results) -> list[str]:
    """Return the columns of `watched_rows`; empty if no result has watched anything."""
    names = watched_names(results)
    return ["run", *(f"{name} {when}" for name in names for when in ("before", "after", "change"))] * bool(
        names
    )


def watched_rows(results: Results, precision: int = 1) -> list[list[str]]:
    """Return what each watched recipe scored before and after as text cells, a row per run that watched."""
    return [
        [
            label,
            *(
                spread(values, precision)
                for name in watched_names(results)
                for values in zip(*(before_and_after(trial, name) for trial in trials), strict=True)
            ),
        ]
        for label, trials in results.items()
        if all(trial.watched for trial in trials)
    ]


def stage_table(trials: Sequence[Trial], precision: int = 1) -> tuple[list[str], list[list[str]]]:
    """Return a run's scores on watched recipes after every task: the header and the rows as text cells.

    Only stages and recipes that all trials have; both empty without any.
    """
    first = trials[0].watched
    stages = [stage for stage in first if all(stage in trial.watched for trial in trials)]
    names = [
        name
        for name in first.get(ZERO_SHOT, {})
        if all(name in trial.watched[stage] for trial in trials for stage in stages)
    ]
    if not names:
        return [], []
    rows = [
        [stage, *(spread([trial.watched[stage][name] for trial in trials], precision) for name in names)]
        for stage in stages
    ]
    return ["after", *(f"{name} (watched)" for name in names)], rows


def watched_records(results: Results) -> dict[str, Any]:
    """Return run → for each trial its seed and stage → recipe → score, and each recipe's mean change."""
    return {
        label: {
            "change": {
                name: mean(before_and_after(trial, name)[2] for trial in trials)
                for name in watched_names(results)
            },
            "trials": [{"seed": trial.seed, "scores": trial.watched} for trial in trials],
        }
        for label, trials in results.items()
        if any(trial.watched for trial in trials)
    }


def watched_cells(results: Results) -> list[list]:
    """Return every score as a row: run, seed, stage, recipe, score."""
    return [
        [label, trial.seed, stage, name, score]
        for label, trials in results.items()
        for trial in trials
        for stage, scores in trial.watched.items()
        for name, score in scores.items()
    ]
