"""The metrics that score predictions.

Functions in files by group, each with its record, and one list of them all.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from llava_keeplora_eval.metrics.lookup import METRICS, as_record, metric_record, metric_source
from llava_keeplora_eval.metrics.records import AnswerMetric, CorpusMetric, MetricRecord

if TYPE_CHECKING:
    import evaluate

__all__ = [
    "METRICS",
    "AnswerMetric",
    "CorpusMetric",
    "MetricRecord",
    "as_record",
    "check_metric",
    "load_metric",
    "metric_record",
    "metric_source",
]


def check_metric(name: str) -> None:
    """Refuse a metric that could not be computed here, so that a long run can ask before it starts.

    Raises:
        EvalError: there is no such metric, or what it needs is not installed.
    """
    metric_record(name).check_installed()


def load_metric(name: str) -> evaluate.Metric:
    """Return a metric as an ``evaluate.Metric``: no network, no download count, nothing shared on disk.

    Args:
        name: as under ``metric`` in a recipe.

    Returns:
        An ``evaluate.Metric``; its ``compute(predictions=..., references=...)`` result has the record's name
        as a key.

    Raises:
        EvalError: there is no such metric.
    """
    metric_record(name)
    # Over a second to import evaluate, which `--help` and the matrix don't need.
    from llava_keeplora_eval.metrics.evaluate_metric import EvaluateMetric

    # Memory instead of cache files, and an id of its own, because two processes that score at once would
    # otherwise meet in one file named after `default_experiment`.
    return EvaluateMetric(config_name=name, experiment_id=uuid.uuid4().hex, keep_in_memory=True)
