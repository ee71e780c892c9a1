"""False alarms and power of the guard's verdicts.

    python scripts/bench_guard.py

An unchanged model answers some questions otherwise, by its batches or precision, as often right as wrong. Of
scores that are right or wrong a verdict depends on two numbers alone, how many answers got worse and how many
better, whatever the accuracy. So each rate is the sum of the probabilities of those pairs of numbers whose
interval, as the guard computes it, breaks the limit: there is no sampling error, but that of the guard's own
resampling, with another seed for each pair. Scores in thirds, as those of VQA, are simulated.

A false alarm is a verdict in which any limit is broken; limits are taken to be independent of one another.
Prints Markdown tables for docs/guard.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from scipy.stats import binom

from llava_keeplora_eval.paired_bootstrap import level_of, mean_change

CONFIDENCE = 0.95
EXAMPLES, FLIPS, LIMITS = (500, 2000), (0.005, 0.02, 0.05, 0.1), (1, 3, 7, 20)
#: Limits of a task in the tables of power and of scores in thirds.
MANY = 7
#: Pairs of numbers that are less probable count as no alarm.
LEAST = 1e-8
#: How far from the normal quantile a drop is certain to be broken or not, in standard errors.
CERTAIN = 0.5


@cache
def upper_bound(counts: tuple[int, ...], values: tuple[float, ...], level: float) -> float:
    """Return the upper bound of the change, in points, if so many examples changed by so many points."""
    differences = np.repeat(values, counts)
    seed = hash(counts) % 2**32
    return mean_change(np.zeros(len(differences)), differences, level, seed).high


def is_broken(counts: Sequence[int], values: Sequence[float], level: float, limit: float) -> bool:
    """Return whether a limit (-1 for a drop of at most 1 point) is broken; see `upper_bound`."""
    n, total = sum(counts), float(np.dot(counts, values))
    error = math.sqrt(float(np.dot(counts, np.square(values))) + 2 * 100**2)
    deviation = (limit * n - total) / error
    quantile = quantile_of(level)
    if abs(deviation - quantile) > CERTAIN:
        return deviation > quantile
    return upper_bound(tuple(map(int, counts)), tuple(values), level) < limit


@cache
def quantile_of(level: float) -> float:
    """Return the normal quantile of a level."""
    from statistics import NormalDist

    return NormalDist().inv_cdf(level)


def broken_rate(n: int, flips: float, drop: float, limit: float, level: float) -> float:
    """Return the probability that one limit is broken, of scores that are right or wrong.

    Args:
        n: number of examples.
        flips: share of them that gets better or worse by chance, half each.
        drop: share of them that gets worse in addition.
        limit: the least accepted change, in points.
        level: of the interval.
    """
    worse, better = flips / 2 + drop, flips / 2
    rate = 0.0
    for lost in range(n + 1):
        first = binom.pmf(lost, n, worse)
        if first < LEAST:
            continue
        second = binom.pmf(np.arange(n - lost + 1), n - lost, better / (1 - worse))
        for gained in np.flatnonzero(first * second >= LEAST):
            counts = (lost, int(gained), n - lost - int(gained))
            if is_broken(counts, (-100.0, 100.0, 0.0), level, limit):
                rate += first * second[gained]
    return rate


def broken_rate_in_thirds(n: int, flips: float, level: float, trials: int) -> float:
    """Return the share of simulated verdicts on an unchanged model that are broken at max_drop 0.

    Answers that flip change their score by one, two or three thirds, equally often.
    """
    values = np.array([-100.0, -200 / 3, -100 / 3, 100 / 3, 200 / 3, 100.0, 0.0])
    shares = [flips / 6] * 6 + [1 - flips]
    drawn = np.random.default_rng([n, int(1000 * flips)]).multinomial(n, shares, trials)
    return sum(is_broken(counts, values.tolist(), level, 0.0) for counts in drawn) / trials


def together(rate: float, limits: int) -> float:
    """Return in percent how often any of so many independent limits is broken."""
    return 100 * (1 - (1 - rate) ** limits)


def false_alarms(trials: int) -> Iterator[str]:
    """Yield the lines of the table of false alarms."""
    levels = {limits: level_of(CONFIDENCE, limits) for limits in LIMITS}
    yield f"False alarms, % of verdicts (scores in thirds: {trials} simulated ones for each limit):\n"
    heads = [f"{limits} limit{'s' * (limits > 1)}" for limits in LIMITS]
    heads[0] = f"max_drop 0: {heads[0]}"
    heads += [f"{MANY} limits, in thirds", f"max_drop 1: {MANY} limits, unchanged"]
    heads += [f"{MANY} limits, all down by 1"]
    yield f"| examples | answers that flip by chance | {' | '.join(heads)} |\n{'|---' * (len(heads) + 2)}|\n"
    for n in EXAMPLES:
        for flips in FLIPS:
            cells = [together(broken_rate(n, flips, 0, 0, level), m) for m, level in levels.items()]
            cells.append(together(broken_rate_in_thirds(n, flips, levels[MANY], trials), MANY))
            cells += [together(broken_rate(n, flips, drop, -1, levels[MANY]), MANY) for drop in (0, 0.01)]
            yield f"| {n} | {100 * flips:g} % | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |\n"


def power() -> Iterator[str]:
    """Yield the lines of the table of power."""
    yield "\nPower for a drop of 2 points, % of verdicts that call the limit broken:\n"
    yield "| examples | answers that flip by chance | max_drop 0, one limit | max_drop 0, 7 limits | "
    yield "max_drop 1, one limit | max_drop 1, 7 limits |\n|---|---|---|---|---|---|\n"
    for n in EXAMPLES:
        for flips in FLIPS:
            cells = [
                100 * broken_rate(n, flips, 0.02, limit, level_of(CONFIDENCE, limits))
                for limit in (0, -1)
                for limits in (1, MANY)
            ]
            yield f"| {n} | {100 * flips:g} % | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |\n"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--trials",
        type=int,
        default=50_000,
        help="simulated verdicts of each cell in thirds (default: 50000)",
    )
    trials = parser.parse_args().trials
    for lines in (false_alarms(trials), power()):
        for text in lines:
            print(text, end="", flush=True)


if __name__ == "__main__":
    main()
