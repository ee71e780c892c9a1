"""Measurement of how long a predictor takes to answer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from llava_keeplora_eval.predictors import Predictor
from llava_keeplora_recipes import Example

#: Size of the batch and number of measurements, small enough for a model that generates text.
EXAMPLES, REPEATS = 16, 5
#: Length of every generated answer, so that a model that learned shorter answers does not seem faster.
TOKENS = 4


def seconds_per_example(predictor: Predictor, examples: Sequence[Example]) -> float:
    """Return the median time per example of answering one batch, in seconds.

    A first, uncounted answer fills the caches (prompt features, images).

    Args:
        predictor: the predictor to measure.
        examples: the batch.
    """
    predictor.predict(examples)
    return statistics.median(_seconds(predictor, examples) for _ in range(REPEATS)) / len(examples)


def _seconds(predictor: Predictor, examples: Sequence[Example]) -> float:
    start = time.perf_counter()
    predictor.predict(examples)  # The answers are on the host, so the GPU has finished.
    return time.perf_counter() - start
