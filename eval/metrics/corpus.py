"""Metrics whose function scores all answers together, most of which are no means over examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.metrics.records import Answers, MetricRecord


@dataclass(frozen=True)
class CorpusMetric(MetricRecord):
    """A metric whose function scores all predictions together.

    The function takes the predictions, the references and, by name in the plural, the ``inputs``; it returns
    the score, at least 0, and a dict of further numbers and notes, which may be empty.
    """

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[Any]
    ) -> dict:
        what = f"{len(predictions)} predictions"
        result = self._call(self.function, what, predictions, references, **inputs)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise EvalError(
                f"the metric '{self.name}' gave {str(result)[:60]!r}, which is no score with a dict of "
                "details",
                "return (score, {}) from its function",
            )
        score, details = result
        return {self.name: self._number(score, what, highest=math.inf), "details": details}
