"""Lookup of metrics by name: those of this package, and plug-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.metrics import answers, captions, coin, general, mllm_acl, mllm_dcl, ucit, vqa
from llava_keeplora_eval.metrics.records import AnswerMetric, MetricRecord
from llava_keeplora_recipes.registry import PluginError, Registry


def _is_metric(value: Any) -> str | None:
    if isinstance(value, MetricRecord) or (callable(value) and not isinstance(value, type)):
        return None
    return "it is neither an AnswerMetric or a CorpusMetric, nor a function of (text, answers)"


#: Name → record; a plug-in may be a function instead of a record, see ``metric_record``.
METRICS = Registry("metric", "llava_keeplora.metrics", {}, _is_metric)
for _group in (answers, vqa, captions, ucit, mllm_dcl, mllm_acl, coin, general):
    METRICS.update({record.name: record for record in _group.METRICS})


def metric_record(name: str) -> MetricRecord:
    """Return the record of a metric by name; a function is wrapped by ``as_record``.

    Args:
        name: the name of a metric of this package or of an entry point of the group
            ``llava_keeplora.metrics``, ``module:object``, or ``path/to/file.py:object``.

    Raises:
        EvalError: there is no such metric, or it cannot be imported.
    """
    try:
        metric = METRICS[METRICS.localize(name)]
    except PluginError as error:
        raise EvalError(error.problem, error.cure) from error
    return as_record(metric)


def as_record(metric: MetricRecord | Callable[..., float]) -> MetricRecord:
    """Return a metric's record; for a function of ``(text, answers)``, one made of its name and docstring."""
    if isinstance(metric, MetricRecord):
        return metric
    identifier = getattr(metric, "__name__", "metric")
    summary = (metric.__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return AnswerMetric(identifier, 1, metric, summary or f"{identifier} accepts the prediction", soft=True)


def metric_source(name: str) -> str | None:
    """Return the SHA-256 of the sources of a plug-in metric; None for a metric of this package.

    Raises:
        EvalError: there is no such metric, or it is not installed.
    """
    try:
        return METRICS.source_hash(METRICS.localize(name))
    except PluginError as error:
        raise EvalError(error.problem, error.cure) from error
