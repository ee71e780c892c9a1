"""The metrics that score predictions, and their registry; each metric is a function with a record."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from llava_keeplora_eval.metrics.corpus import CorpusMetric
from llava_keeplora_eval.metrics.lookup import METRICS, as_record, metric_record, metric_source
from llava_keeplora_eval.metrics.records import AnswerMetric, MetricRecord
from llava_keeplora_eval.metrics.units import Grouping, UnitScores

if TYPE_CHECKING:
    import evaluate

__all__ = [
    "METRICS",
    "AnswerMetric",
    "CorpusMetric",
    "Grouping",
    "MetricRecord",
    "UnitScores",
    "as_record",
    "check_metric",
    "load_metric",
    "metric_record",
    "metric_source",
]


def check_metric(name: str) -> None:
    """Check before a long run that a metric can be computed on this machine.

    Raises:
        EvalError: there is no such metric, or a program that it needs is not installed.
    """
    metric_record(name).check_installed()


def load_metric(name: str) -> evaluate.Metric:
    """Load a metric as an ``evaluate.Metric``, without network, download count or shared cache files.

    Args:
        name: as under ``metric`` in a recipe.

    Returns:
        An ``evaluate.Metric``; its ``compute(predictions=..., references=...)`` result has the record's name
        as a key.

    Raises:
        EvalError: there is no such metric.
    """
    metric_record(name)
    # Importing evaluate takes over a second, and `--help` and the matrix don't need it.
    from llava_keeplora_eval.metrics.evaluate_metric import EvaluateMetric

    # In memory and with a unique id, because two processes that score at the same time would otherwise use
    # the same cache file, that of `default_experiment`.
    return EvaluateMetric(config_name=name, experiment_id=uuid.uuid4().hex, keep_in_memory=True)
