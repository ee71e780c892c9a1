"""False alarms and power of the guard's verdicts, measured on simulated answers.

    python scripts/bench_guard.py [--trials 2000]

An unchanged model answers some questions otherwise, by its batches or precision, as often right as wrong
(`churn`, a share of the examples). A changed one loses 2 points in addition. A task of the guard has 7
limits at once, and a false alarm is a verdict with any of them broken; power is that of the one limit whose
task lost 2 points. Prints Markdown tables for docs/guard.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache

import numpy as np

from llava_keeplora_eval.paired_bootstrap import Change, Outcome, level_of, mean_change

LIMITS, CONFIDENCE = 7, 0.95
EXAMPLES, CHURNS = (500, 2000), (0.005, 0.02, 0.05, 0.1)


def answers(
    rng: np.random.Generator, n: int, churn: float, drop: float, soft: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of n examples before and after.

    Args:
        rng: the source of randomness.
        n: number of examples.
        churn: share of them that gets better or worse by chance, half each.
        drop: share of them that gets worse in addition.
        soft: whether scores lie between 0 and 100, in thirds as those of VQA; otherwise they are 0 or 100.
    """
    turn = rng.random(n)
    worse, better = turn < churn / 2 + drop, turn > 1 - churn / 2
    before = np.where(worse, 100.0, np.where(better, 0.0, 100.0 * (rng.random(n) < 0.6)))
    step = rng.integers(1, 4, n) * (100 / 3) if soft else 100.0
    return before, before + step * better - step * worse


def outcome(before: np.ndarray, after: np.ndarray, level: float, limit: float) -> Outcome:
    """Return the verdict on one limit; equal counts of equal changes are resampled once."""
    values, counts = np.unique(after - before, return_counts=True)
    return _change(tuple(values.tolist()), tuple(counts.tolist()), level).outcome(limit)


@cache
def _change(values: tuple[float, ...], counts: tuple[int, ...], level: float) -> Change:
    differences = np.repeat(values, counts)
    return mean_change(np.zeros(len(differences)), differences, level, seed=1)


def false_alarms(n: int, churn: float, limit: float, soft: bool, trials: int) -> float:
    """Return the share of verdicts on an unchanged model that have a broken limit."""
    level = level_of(CONFIDENCE, LIMITS)
    alarms = 0
    for trial in range(trials):
        rng = np.random.default_rng([n, int(churn * 1000), soft, trial])
        alarms += any(
            outcome(*answers(rng, n, churn, 0.0, soft), level, limit) is Outcome.BROKEN for _ in range(LIMITS)
        )
    return 100 * alarms / trials


def power(n: int, churn: float, limit: float, limits: int, trials: int) -> float:
    """Return the share of verdicts that call a limit broken whose task lost 2 points."""
    level = level_of(CONFIDENCE, limits)
    broken = 0
    for trial in range(trials):
        rng = np.random.default_rng([n, int(churn * 1000), 7, trial])
        broken += outcome(*answers(rng, n, churn, 0.02, False), level, limit) is Outcome.BROKEN
    return 100 * broken / trials


def tables(trials: int) -> Iterator[str]:
    """Yield the lines of the two tables."""
    yield f"False alarms on an unchanged model, % of {trials} verdicts with {LIMITS} limits each:\n"
    yield "| examples | answers that flip by chance | max_drop 0, right or wrong | max_drop 0, in thirds | "
    yield "max_drop 1, right or wrong |\n|---|---|---|---|---|\n"
    for n in EXAMPLES:
        for churn in CHURNS:
            cells = [false_alarms(n, churn, -limit, soft, trials) for limit, soft in ((0, 0), (0, 1), (1, 0))]
            yield f"| {n} | {100 * churn:g} % | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |\n"
    yield f"\nPower for a drop of 2 points, % of {trials} verdicts that call the limit broken:\n"
    yield "| examples | answers that flip by chance | max_drop 0, one limit | max_drop 0, 7 limits | "
    yield "max_drop 1, one limit | max_drop 1, 7 limits |\n|---|---|---|---|---|---|\n"
    for n in EXAMPLES:
        for churn in CHURNS:
            cells = [power(n, churn, -limit, limits, trials) for limit in (0, 1) for limits in (1, LIMITS)]
            yield f"| {n} | {100 * churn:g} % | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |\n"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000, help="verdicts per cell (default: 2000)")
    for text in tables(parser.parse_args().trials):
        print(text, end="", flush=True)


if __name__ == "__main__":
    main()
