"""Intervals of the change between two models' scores on the same examples, and verdicts against a limit.

Legend: n examples; d_i = after_i - before_i, the change of one example's score, in points; δ their mean. A
limit is the least change that is accepted: -2 for a drop of at most 2 points, +3 for a gain of at least 3.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13; Agresti and Min,
Simple improved confidence intervals for comparing matched proportions, Statistics in Medicine 24, 2005.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np

from llava_keeplora_eval.errors import EvalError

#: Bootstrap samples of a mean, and of a score that is computed anew for each of them.
RESAMPLES, RESCORINGS = 10_000, 200
#: Fewest examples (or groups of examples) for which a score that is no mean gets an interval.
LEAST_RESCORED = 30
#: Fewest samples of a mean beyond a bound for the bound to be their quantile alone.
LEAST_BEYOND = 20
#: Probability with which the number of examples of `Verdict.examples` decides, if the change is as measured.
POWER = 0.8
#: Most examples that are given as a number; beyond them a change is as good as at its limit.
MOST_EXAMPLES = 1_000_000
#: Numbers drawn at once.
CHUNK = 4_000_000


class Outcome(StrEnum):
    """What the examples say of a limit."""

    HELD = "held"
    BROKEN = "broken"
    UNDECIDED = "can't be told"


@dataclass(frozen=True)
class Change:
    """The change of a score from one model to another on the same examples, in points.

    Args:
        before, after: the two scores, in percent.
        low, high: the bounds of the change, each one-sided at the level that was asked for.
        error: the bootstrap's standard error of the change.
        n: number of examples.
        better, worse: number of examples whose score rose and fell; None for a score that is no mean.
        quantile: the normal quantile of the level.
    """

    before: float
    after: float
    low: float
    high: float
    error: float
    n: int
    better: int | None
    worse: int | None
    quantile: float

    @property
    def points(self) -> float:
        """The measured change."""
        return self.after - self.before

    def outcome(self, limit: float) -> Outcome:
        """Return whether the change is at least `limit`: held or broken if its interval excludes the other.

        With intervals of level 1 - α/m for each of m limits, a limit that is kept is called broken, or one
        that is not is called held, with probability at most about α for all limits together.
        """
        if self.high < limit:
            return Outcome.BROKEN
        return Outcome.HELD if self.low >= limit else Outcome.UNDECIDED

    def examples(self, limit: float) -> int | None:
        """Estimate the number of examples that would decide about a limit with probability `POWER`.

        It assumes that the change and its spread are as measured: n ((z + z_power) error / |δ - limit|)².

        Returns:
            the number, rounded up to two digits; None if the change is too near to the limit.
        """
        distance = abs(self.points - limit)
        z = self.quantile + NormalDist().inv_cdf(POWER)
        if distance * math.sqrt(MOST_EXAMPLES) <= z * self.error * math.sqrt(self.n):
            return None
        needed = math.ceil(self.n * (z * self.error / distance) ** 2)
        step = 10 ** max(0, len(str(needed)) - 2)
        return -(-needed // step) * step


def level_of(confidence: float, limits: int) -> float:
    """Return the level of each interval with which all limits together have a confidence (Bonferroni).

    Holm's procedure rejects more often, but it has no intervals that one could print next to the verdicts,
    nor a third verdict; Bonferroni's intervals hold all at once, however the scores depend on one another.
    """
    return 1 - (1 - confidence) / max(1, limits)


def mean_change(
    before: Sequence[float], after: Sequence[float], level: float, seed: int = 0, span: float = 100.0
) -> Change:
    """Return the change of a mean over examples, with its percentile bootstrap over pairs.

    One example that got wholly better and one that got wholly worse are added before resampling, like half
    a pair in each cell in Agresti and Min: the plain bootstrap gives n equal answers an interval of width 0,
    and takes three flips to one side for proof. At a level so high that fewer than `LEAST_BEYOND` samples lie
    beyond a bound, the bound is at least as far out as the normal one.

    Args:
        before, after: every example's score from the two models, in percent, in the same order.
        level: of each bound, such as 0.95.
        seed: of the resampling.
        span: difference between the best and the worst score of an example, in points.

    Raises:
        EvalError: there are no examples, different numbers of them, or a score is not finite.
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if len(first) != len(second) or not len(first):
        raise EvalError(
            f"{len(first)} scores before and {len(second)} after can't be compared in pairs",
            "score the same examples, at least one, with both models",
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise EvalError("an example's score is not finite", "correct the metric, or choose another")
    differences = second - first
    means = _resampled_means(np.append(differences, [span, -span]), seed)
    low = float(np.quantile(means, 1 - level, method="lower"))
    high = float(np.quantile(means, level, method="higher"))
    quantile = NormalDist().inv_cdf(level)
    if RESAMPLES * (1 - level) < LEAST_BEYOND:
        center, width = float(means.mean()), quantile * float(means.std())
        low, high = max(-span, min(low, center - width)), min(span, max(high, center + width))
    return Change(
        before=float(first.mean()),
        after=float(second.mean()),
        low=low,
        high=high,
        error=float(means.std()),
        n=len(first),
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
        quantile=quantile,
    )


def _resampled_means(differences: np.ndarray, seed: int) -> np.ndarray:
    """Return the means of `RESAMPLES` samples with replacement, by the counts of equal differences."""
    values, counts = np.unique(differences, return_counts=True)
    rng, rows = np.random.default_rng(seed), max(1, CHUNK // len(values))
    shares, n = counts / len(differences), len(differences)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return np.concatenate([rng.multinomial(n, shares, size) @ values / n for size in sizes])


def rescored_change(
    scores: Callable[[Sequence[int]], tuple[float, float]],
    n: int,
    level: float,
    seed: int = 0,
    added: int = 0,
) -> Change:
    """Return the change of a score that is no mean over examples, such as CIDEr or F1.

    The score is computed anew on `RESCORINGS` samples of the examples, which suffice for its standard error
    (Efron and Tibshirani, section 6.4), and the bounds are normal ones.

    Args:
        scores: positions of examples, which may repeat → (score before, score after), in percent.
        n: number of examples, or of groups that are only scored together.
        level: of each bound.
        seed: of the resampling.
        added: number of positions from n on that are drawn as well, and are not in the change itself.

    Raises:
        EvalError: there are fewer than `LEAST_RESCORED` examples.
    """
    if n < LEAST_RESCORED:
        raise EvalError(
            f"a score that is no mean over examples needs at least {LEAST_RESCORED} of them for an interval "
            f"(got {n})",
            "watch more examples, or choose a metric of single answers",
        )
    before, after = scores(range(n))
    rng, quantile = np.random.default_rng(seed), NormalDist().inv_cdf(level)
    changes = []
    for _ in range(RESCORINGS):
        first, second = scores(rng.integers(n + added, size=n).tolist())
        changes.append(second - first)
    error, change = float(np.std(changes, ddof=1)), after - before
    low, high = change - quantile * error, change + quantile * error
    return Change(before, after, low, high, error, n, None, None, quantile)
