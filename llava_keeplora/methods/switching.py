"""Predictor of methods that keep the updates of tasks apart and answer each example with one of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from llava_keeplora.adapters import BaseWeights, Deltas
from llava_keeplora_eval.predictors import Predictor

if TYPE_CHECKING:
    from llava_keeplora_recipes import Example

#: In the place of a task's number: the untouched base.
BASE = -1


#: See `Method.zero3_conflict`.
ZERO3_CONFLICT = "answers with another task's update in every process, where shards need all to answer alike"


def route_names(routes: Sequence[int], learned: Sequence[str]) -> list[str | None]:
    """Return the names of tasks by their numbers, 0 for the first; None for `BASE`. See `Predictor`."""
    return [None if task == BASE else learned[task] for task in routes]


class SwitchingPredictor:
    """Answers with the update of the task that each example is routed to.

    Updates are on the model only during a call.

    Args:
        predictor: the base's own predictor for the task, not used before: it may cache what it makes of the
            weights.
        learned: names of the tasks learned, in order.
        choose: examples → the task of each, 0 for the first; `BASE` for the untouched base.
        carrying: a task → context in which the model carries its update.
    """

    def __init__(
        self,
        predictor: Predictor,
        learned: Sequence[str],
        choose: Callable[[Sequence[Example]], list[int]],
        carrying: Callable[[int], AbstractContextManager[None]],
    ):
        self.base, self.learned, self.choose, self.carrying = predictor, learned, choose, carrying
        #: See `Predictor`.
        self.routed_to: list[str | None] = []
        self._predictors: dict[int, Predictor] = {}

    def predict(self, examples: Sequence[Example]) -> list[str]:
        """Return one text per example, in order."""
        chosen, answers = self.choose(examples), [""] * len(examples)
        self.routed_to = route_names(chosen, self.learned)
        for task in dict.fromkeys(chosen):
            rows = [row for row, other in enumerate(chosen) if other == task]
            for row, answer in zip(rows, self._answer(task, [examples[row] for row in rows])):
                answers[row] = answer
        return answers

    def _answer(self, task: int, examples: Sequence[Example]) -> list[str]:
        if task not in self._predictors:
            self._predictors[task] = copy.copy(self.base)
        if task == BASE:
            return self._predictors[task].predict(examples)
        with self.carrying(task):
            return self._predictors[task].predict(examples)


@contextmanager
def carrying(weights: BaseWeights, deltas: Deltas) -> Iterator[None]:
    """Put an update on the base's weights while the block runs."""
    weights.apply([deltas])
    try:
        yield
    finally:
        weights.apply([])
