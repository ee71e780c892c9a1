"""Units of a score: the answers that are right or wrong together, such as both questions about an image.

A metric of answers is a weighted mean over units, by default one unit per example. Whoever draws from the
examples, a bootstrap or a subset, draws units: their scores are independent of each other, while the
examples of a unit belong together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_keeplora_eval.errors import EvalError


def all_right(scores: Sequence[float]) -> float:
    """Return 1 if every answer of a unit is right, otherwise 0."""
    return float(min(scores) == 1)


@dataclass(frozen=True)
class Grouping:
    """The rule by which examples form units.

    Args:
        inputs: names of the inputs that tell the units apart. The metric's function is not given them, unless
            they are among its own inputs.
        combine: function from the scores of a unit's answers to the unit's score, 0 to 1.
        noun: what a unit is, in the plural, for messages.
        key: function of the inputs' values, in order, that returns what the examples of a unit have in
            common; by default all of the values.
        size: the number of examples of a unit; None where units differ.
        stratum: one of ``inputs``, equal within each unit: the score is the mean over its values of the mean
            over their units, so that each value counts the same. None for the mean over all units.
    """

    inputs: tuple[str, ...]
    combine: Callable[[Sequence[float]], float] = all_right
    noun: str = "groups"
    key: Callable[..., Hashable] = lambda *values: values
    size: int | None = None
    stratum: str | None = None

    def members(self, inputs: Mapping[str, Sequence[Any]], metric: str) -> list[list[int]]:
        """Return the positions of the examples of each unit, in the order of their first examples.

        Args:
            inputs: values per example, by the plural of the inputs' names.
            metric: the metric's name, for errors.

        Raises:
            EvalError: a value cannot be read, or a unit has another number of examples than ``size``.
        """
        units: dict[Hashable, list[int]] = {}
        for i, values in enumerate(zip(*(inputs[f"{name}s"] for name in self.inputs), strict=True)):
            try:
                key = self.key(*values)
                units.setdefault(key, []).append(i)
            except (TypeError, ValueError) as error:
                given = " and ".join(
                    f"{name} {value!r}" for name, value in zip(self.inputs, values, strict=True)
                )
                raise EvalError(
                    f"the metric '{metric}' cannot tell to which of the {self.noun} the example with the "
                    f"{given} belongs ({error})",
                    "correct the field in the data",
                ) from error
        wrong = [key for key, members in units.items() if self.size not in (None, len(members))]
        if wrong:
            raise EvalError(
                f"the metric '{metric}' scores {self.noun} of {self.size} examples each, and {len(wrong)} of "
                f"{len(units)} have another number ({wrong[0]!r} has {len(units[wrong[0]])})",
                "complete the data, or leave all examples of these out",
            )
        return list(units.values())

    def weights(self, members: list[list[int]], inputs: Mapping[str, Sequence[Any]]) -> list[float]:
        """Return the weight of each unit in the score; they sum to 1."""
        if self.stratum is None:
            return [1 / len(members)] * len(members)
        strata = [inputs[f"{self.stratum}s"][unit[0]] for unit in members]
        counts = Counter(strata)
        return [1 / (len(counts) * counts[stratum]) for stratum in strata]


@dataclass(frozen=True)
class UnitScores:
    """Scores of the units of a set of answers; the metric's score is ``mean``.

    Args:
        members: the positions of the examples of each unit.
        scores: the score of each unit, 0 to 1.
        weights: the weight of each unit in the score; they sum to 1.
    """

    members: list[list[int]]
    scores: list[float]
    weights: list[float]

    @property
    def mean(self) -> float:
        """The weighted mean of the scores."""
        if len(set(self.weights)) == 1:
            return sum(self.scores) / len(self.scores)
        return math.fsum(score * weight for score, weight in zip(self.scores, self.weights, strict=True))

    @property
    def contributions(self) -> list[float]:
        """The scores scaled so that their plain mean is ``mean``, for statistics of means."""
        count = len(self.scores)
        if len(set(self.weights)) == 1:
            return self.scores
        return [score * weight * count for score, weight in zip(self.scores, self.weights, strict=True)]

    @property
    def span(self) -> float:
        """The largest possible contribution of a unit."""
        return max(self.weights) * len(self.weights)


@dataclass(frozen=True)
class Answered:
    """Answers with their scores, from which a metric's details are computed.

    Args:
        texts: the predictions, without white space around them.
        references: the accepted texts of each example.
        inputs: values per example, by the plural of the inputs' names.
        scores: the score of each answer, 0 to 1.
        units: the scores of the units.
    """

    texts: list[str]
    references: Sequence[Sequence[str]]
    inputs: Mapping[str, Sequence[Any]]
    scores: list[float]
    units: UnitScores

    def split_by(self, name: str) -> dict[str, list[int]]:
        """Return the positions of the units by their value of an input, sorted; empty without the input."""
        found: dict[str, list[int]] = {}
        values = self.inputs.get(f"{name}s", ())
        for position, unit in enumerate(self.units.members if values else ()):
            value = values[unit[0]]
            found.setdefault("none" if value in (None, "") else str(value), []).append(position)
        return dict(sorted(found.items()))

    def unit_mean(self, positions: Sequence[int]) -> float:
        """Return the mean score of some units."""
        return sum(self.units.scores[i] for i in positions) / len(positions)
