"""Wrong answers by class, per task and stage, and the most frequent confusions of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_keeplora.report.results import Results, Trial, mean
from llava_keeplora_eval.error_classes import ERROR_CLASSES, OTHER
from llava_keeplora_eval.guard import printable
from llava_keeplora_eval.matrix import ZERO_SHOT, format_number

ERROR_COLUMNS = ("task", "after", "n", "wrong", *ERROR_CLASSES)
CONFUSION_COLUMNS = ("task", "most frequent confusions at the end")


def _stages(trial: Trial) -> list[tuple[str, Mapping[str, Mapping]]]:
    """Return (the task after which it was scored, task → score) of every stage, the base's first."""
    return list(zip((ZERO_SHOT, *trial.matrix.tasks), trial.scores, strict=False))


def error_counts(trial: Trial) -> dict[str, dict[str, dict[str, int]]]:
    """Return task → stage → class → number of wrong answers, where they were counted."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for after, scores in _stages(trial):
        for task, score in scores.items():
            if "errors" in score:
                counts.setdefault(task, {})[after] = dict(score["errors"])
    return counts


def error_rows(trials: Sequence[Trial]) -> list[list[str]]:
    """Return the wrong answers by class as text cells, a row per task and stage, means over the trials.

    Tasks whose errors are all `other` are left out: there the classes say nothing.
    """
    rows = []
    counts = [error_counts(trial) for trial in trials]
    for task in trials[0].matrix.tasks:
        stages = [after for after in counts[0].get(task, ()) if all(after in c.get(task, {}) for c in counts)]
        if not any(set(c[task][after]) - {OTHER} for c in counts for after in stages):
            continue
        sizes = {task: score["n"] for _, scores in _stages(trials[0]) for task, score in scores.items()}
        for after in stages:
            errors = [c[task][after] for c in counts]
            numbers = [
                mean(sum(e.values()) for e in errors),
                *(mean(e.get(name, 0) for e in errors) for name in ERROR_CLASSES),
            ]
            precision = 0 if len(trials) == 1 else 1
            rows.append(
                [task, after, str(sizes[task]), *(format_number(number, precision) for number in numbers)]
            )
    return rows


def confusion_rows(trials: Sequence[Trial]) -> list[list[str]]:
    """Return the most frequent confusions of each task at the end; nothing for several trials."""
    if len(trials) > 1:
        return []
    last = {task: score for _, scores in _stages(trials[0]) for task, score in scores.items()}
    return [
        [
            task,
            "; ".join(f"{name} → {printable(text)} ({count})" for name, text, count in score["confusions"]),
        ]
        for task, score in last.items()
        if score.get("confusions")
    ]


def answer_records(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Return run → one record per seed: its errors, and its confusions, per task and stage."""
    return {
        name: [
            {
                "seed": trial.seed,
                "errors": error_counts(trial),
                "confusions": {
                    task: {
                        after: scores[task]["confusions"]
                        for after, scores in _stages(trial)
                        if "confusions" in scores.get(task, {})
                    }
                    for task in trial.matrix.tasks
                },
            }
            for trial in trials
        ]
        for name, trials in results.items()
    }
