"""Any metric of this package as an ``evaluate.Metric``, without a network.

>>> evaluate.load(f"{llava_keeplora_eval.metrics.__path__[0]}/evaluate_metric.py", "accuracy")

The second argument is the metric's name, as under ``metric`` in a recipe. ``evaluate`` uses the first metric
class of a module, so this one has a single class.
"""

from __future__ import annotations

import re

import datasets
import evaluate

from llava_keeplora_eval.metrics.lookup import metric_record

_INPUTS = """
Args:
    predictions: one text per example; an empty one is wrong.
    references: one list of accepted texts per example.
    {inputs}
Returns:
    {name}: the score, and what else `MetricRecord.compute` of the metric returns.
"""


class EvaluateMetric(evaluate.Metric):
    """The metric whose name is ``config_name``; its result has that name as a key."""

    config_name: str

    def _info(self) -> evaluate.MetricInfo:
        self.record = metric_record(self.config_name)
        # evaluate creates a folder of this name, and the name of a metric from a file is a path.
        self.config_name = re.sub(r"[^\w.-]+", "_", self.config_name)
        inputs = " ".join(f"{key}s: one per example." for key in self.record.required)
        return evaluate.MetricInfo(
            description=self.record.description,
            citation=self.record.citation,
            inputs_description=_INPUTS.format(name=self.record.name, inputs=inputs),
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions, references, **inputs) -> dict:
        return self.record.compute(predictions, references, **inputs)
