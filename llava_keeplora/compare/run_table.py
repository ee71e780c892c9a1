"""Execution of a table: tuning, then all runs, then their results side by side."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_keeplora.compare.budget import check_budgets
from llava_keeplora.compare.jobs import Failure, Job, run_jobs, table_jobs, tuning_jobs
from llava_keeplora.compare.table import BOUND_METRIC, Table, merged
from llava_keeplora.config import only_methods
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.files import writable_folder
from llava_keeplora.report.results import Results
from llava_keeplora.report.run_report import read_side_by_side
from llava_keeplora.run_folder import CONFIG, MATRIX
from llava_keeplora_eval import Matrix

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tried:
    """Result of one setting of one method on the held-out part of the training data.

    Args:
        label: the method's label.
        settings: the settings that were tried.
        metrics: the aggregates, in percent.
        chosen: whether these settings are the best of their method.
    """

    label: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, float | None]
    chosen: bool


@dataclass(frozen=True)
class TableResult:
    """Results of a table after its runs.

    Args:
        results: order → label → trials, one per finished seed, zero-shot first; an order without finished
            runs is left out.
        tried: every setting of every method whose tuning is finished.
        settings: label → the settings with which the method runs.
        failures: runs that failed.
    """

    results: dict[str, Results]
    tried: list[Tried]
    settings: dict[str, dict[str, Any]]
    failures: list[Failure]


def compare(table: Table, workers: int = 1, labels: Sequence[str] | None = None) -> TableResult:
    """Run, or resume, all runs of a table.

    Args:
        table: the table.
        workers: number of runs at a time.
        labels: labels of the methods to run; for others, results of finished runs are used. All methods when
            None.

    Raises:
        UserError: the table is not valid; this is checked before anything runs.
    """
    selected = only_methods(table.methods, table.methods if labels is None else labels)
    _check(table, selected)
    tuning = tuning_jobs(table)
    failures = run_jobs([job for jobs in tuning.values() for job in jobs], workers, selected)
    tried = [trial for label, jobs in tuning.items() for trial in _score_settings(table, label, jobs)]
    settings = table.methods if table.tuning is None else _chosen(table, tried)
    orders = table_jobs(table, settings)
    failures += run_jobs([job for jobs in orders.values() for job in jobs], workers, selected)
    finished = {order: [job.folder for job in jobs if job.finished()] for order, jobs in orders.items()}
    results = {order: read_side_by_side(folders) for order, folders in finished.items() if folders}
    return TableResult(results, tried, settings, failures)


def _check(table: Table, selected: Collection[str]) -> None:
    """Check the configuration of every run of the selected methods, before the first of them starts.

    Raises:
        UserError: naming the first error.
    """
    if not selected:
        raise ConfigError(
            "no method of the table learns anything, so there is nothing to run", "name one under methods"
        )
    if (table.output_dir / CONFIG).exists():
        raise RunError(
            f"{table.output_dir} is a run's folder, and a table has many runs",
            "choose another one with --output-dir",
        )
    for job in itertools.chain(
        *table_jobs(table, {label: table.methods[label] for label in selected}).values()
    ):
        job.identity  # noqa: B018  Reading it checks the configuration.
    tuning = tuning_jobs(table)
    lengths = [
        len(_tried_identity(job, number)["tasks"])
        for label, jobs in tuning.items()
        if label in selected
        for number, job in enumerate(jobs, start=1)
    ]
    if min(lengths, default=2) < 2 and "transfer" in table.tuning.metrics:
        raise ConfigError(
            f"tuning.metric is '{table.tuning.metric}', and one task alone has no transfer",
            "choose by `last`, or give more tasks",
        )
    check_budgets(table, {label: table.methods[label] for label in selected}, tuning)
    try:
        writable_folder(table.output_dir)
    except OSError as error:
        raise RunError(
            f"the table's folder {table.output_dir} cannot be written to ({error.strerror})",
            "choose another one with --output-dir",
        ) from error


def _tried_identity(job: Job, number: int) -> dict[str, Any]:
    """Return the identity of the run that tries a setting; errors name the setting's place in the table."""
    try:
        return job.identity
    except ConfigError as error:
        raise ConfigError(
            f"tuning.settings.{job.label}, the setting number {number}: {error.problem}", error.cure
        ) from error


def _score_settings(table: Table, label: str, jobs: Sequence[Job]) -> list[Tried]:
    """Return a method's settings with their scores, the best one marked as chosen.

    The list is empty while a run is unfinished, so that a choice is always among all settings.
    """
    if not all(job.finished() for job in jobs):
        return []
    matrices = [Matrix.from_json(job.folder / label / MATRIX) for job in jobs]
    # A bound has no other number; a run that its guard stopped has none, and is not chosen.
    names = [BOUND_METRIC] if any(matrix.bound for matrix in matrices) else table.tuning.metrics
    metrics = [matrix.metrics() for matrix in matrices]
    sums = [_total([scores[name] for name in names]) for scores in metrics]
    best = max(
        (number for number, total in enumerate(sums) if total is not None), key=sums.__getitem__, default=None
    )
    if jobs and best is None:
        logger.warning(
            "no setting of '%s' has a complete %s, so the method is not run", label, " + ".join(names)
        )
    return [
        Tried(label, settings, scores, i == best)
        for i, (settings, scores) in enumerate(zip(table.tuning.settings[label], metrics))
    ]


def _total(values: Sequence[float | None]) -> float | None:
    """Return the sum; None if a value is missing."""
    return None if None in values else sum(values)


def _chosen(table: Table, tried: Sequence[Tried]) -> dict[str, dict[str, Any]]:
    """Return label → settings, for the methods whose tuning is finished or that have nothing to tune."""
    best = {trial.label: trial.settings for trial in tried if trial.chosen} | {
        label: {} for label, settings in table.tuning.settings.items() if not settings
    }
    return {
        label: merged(settings, best[label]) for label, settings in table.methods.items() if label in best
    }
