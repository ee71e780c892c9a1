"""The metrics that score predictions: an explicit list, each a local ``evaluate.Metric`` in its own folder."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_recipes.errors import nearest

if TYPE_CHECKING:
    import evaluate


@dataclass(frozen=True)
class MetricRecord:
    """What the package knows of a metric without loading it.

    Args:
        name: the name that recipes use; also the folder, the module and the key of the result.
        version: raised whenever the rule changes, and kept with every score.
        to_percent: what the result is multiplied by to be on the 0-100 scale.
        summary: the rule, in a line.
    """

    name: str
    version: int
    to_percent: float
    summary: str


METRICS = {
    record.name: record
    for record in (
        MetricRecord("accuracy", 1, 100.0, "the prediction is one of the accepted texts, letter by letter"),
    )
}


def metric_record(name: str) -> MetricRecord:
    """The record of a metric by name.

    Raises:
        EvalError: there is no such metric.
    """
    if name not in METRICS:
        raise EvalError(f"there is no metric '{name}'", nearest(name, METRICS))
    return METRICS[name]


def load_metric(name: str) -> evaluate.Metric:
    """Load a metric of this package from its file: no network, no download count, nothing shared on disk.

    Args:
        name: one of ``METRICS``.

    Returns:
        An ``evaluate.Metric``; its ``compute(predictions=..., references=...)`` result has the key ``name``.

    Raises:
        EvalError: there is no such metric.
    """
    metric_record(name)
    import evaluate  # over a second to import, which `--help` and the matrix don't need

    # A local path never reaches the Hub. Memory instead of cache files, and an id of its own, because two
    # processes that score at once would otherwise meet in one file named after `default_experiment`.
    return evaluate.load(
        str(Path(__file__).parent / name), module_type="metric", experiment_id=uuid.uuid4().hex, keep_in_memory=True
    )
