"""How long a predictor takes to answer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from llava_keeplora_eval.predictors import Predictor
from llava_keeplora_recipes import Example

#: Few enough that a model that writes sentences is done in a moment.
EXAMPLES, REPEATS = 16, 5
#: Of every answer of a model that writes: one that learned shorter answers is not quicker for it.
TOKENS = 4


def seconds_per_example(predictor: Predictor, examples: Sequence[Example]) -> float:
    """Return the median time of several answers to one batch, per example.

    A first answer, which fills caches (prompt features, pictures), is not counted.

    Args:
        predictor: what answers.
        examples: the batch.
    """
    predictor.predict(examples)
    return statistics.median(_seconds(predictor, examples) for _ in range(REPEATS)) / len(examples)


def _seconds(predictor: Predictor, examples: Sequence[Example]) -> float:
    start = time.perf_counter()
    predictor.predict(examples)  # Its texts are on the host, so that a GPU has nothing left to do.
    return time.perf_counter() - start
