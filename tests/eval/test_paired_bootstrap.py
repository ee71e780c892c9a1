"""The guard's intervals, against exact distributions, normal theory and simulation."""

import math
import random
from collections import Counter
from statistics import NormalDist, fmean, pstdev

import pytest

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.paired_bootstrap import (
    Outcome,
    level_of,
    mean_change,
    rescored_change,
)


def exact_bounds(differences: list[int], level: float) -> tuple[float, float]:
    """Quantiles of the mean of n draws with replacement, from the exact distribution of their sum."""
    pool = [*differences, 100, -100]
    n, one = len(pool), Counter(pool)
    sums = {0: 1.0}
    for _ in range(n):
        longer: Counter = Counter()
        for total, weight in sums.items():
            for value, count in one.items():
                longer[total + value] += weight * count / n
        sums = longer
    low = high = None
    below = 0.0
    for total in sorted(sums):
        below += sums[total]
        if low is None and below >= 1 - level:
            low = total / n
        if high is None and below >= level:
            high = total / n
    return low, high


@pytest.mark.parametrize("level", [0.95, 0.99])
def test_the_bounds_are_quantiles_of_the_exact_bootstrap_distribution(level):
    before, after = [100] * 12 + [0] * 28, [0] * 7 + [100] * 5 + [100] * 2 + [0] * 26
    change = mean_change(before, after, level, seed=3)
    low, high = exact_bounds([b - a for a, b in zip(before, after)], level)
    # The quantiles of 10 000 draws of a mean in steps of 100 / 42 points are at most one step off.
    assert change.low == pytest.approx(low, abs=100 / 42 + 1e-9)
    assert change.high == pytest.approx(high, abs=100 / 42 + 1e-9)
    assert (change.before, change.after, change.better, change.worse, change.n) == (30, 17.5, 2, 7, 40)


def test_scores_between_0_and_100_have_the_interval_of_normal_theory():
    draw = random.Random(1)
    before = [draw.uniform(0, 80) for _ in range(300)]
    after = [score + draw.gauss(1, 10) for score in before]
    change = mean_change(before, after, 0.975)
    differences = [b - a for a, b in zip(before, after)]
    error = math.sqrt((pstdev(differences) ** 2 * 300 + 2 * 100**2) / 302 / 302)
    assert change.error == pytest.approx(error, rel=0.05)
    assert change.high == pytest.approx(fmean(differences) + 1.96 * error, abs=0.15)


def test_few_examples_without_a_flip_prove_nothing_and_many_do():
    few, many = (mean_change([100] * n, [100] * n, 0.95) for n in (20, 500))
    assert few.outcome(-1) is Outcome.UNDECIDED and many.outcome(-1) is Outcome.HELD


def test_a_level_beyond_what_the_samples_tell_has_bounds_of_normal_theory():
    scores = [100] * 300 + [0] * 200, [0] * 40 + [100] * 290 + [0] * 170
    change, usual = (mean_change(*scores, level) for level in (1 - 1e-7, 0.99))
    assert change.high == pytest.approx(change.points + 5.2 * change.error, abs=0.2)
    assert change.low == pytest.approx(change.points - 5.2 * change.error, abs=0.2)
    assert change.error == usual.error and change.low < usual.low and change.high > usual.high
    few = mean_change([100] * 3, [100] * 3, 1 - 1e-7)
    assert (few.low, few.high) == (-100, 100)  # A mean changes by no more.


def test_three_flips_to_one_side_are_no_proof_of_a_drop():
    scores = [0] * 3 + [100] * 497
    assert mean_change([100] * 500, scores, 0.95).outcome(0) is Outcome.UNDECIDED


def test_a_large_drop_is_broken_and_a_gain_of_the_limit_or_more_is_held():
    dropped = mean_change([100] * 300 + [0] * 200, [0] * 30 + [100] * 270 + [0] * 200, 0.99)
    assert dropped.outcome(-2) is Outcome.BROKEN and dropped.outcome(-20) is Outcome.HELD
    gained = mean_change([0] * 500, [100] * 200 + [0] * 300, 0.99)
    assert gained.outcome(3) is Outcome.HELD and gained.outcome(60) is Outcome.BROKEN


def test_the_same_scores_and_seed_give_the_same_bounds():
    scores = [100, 0] * 50, [0, 100, 100, 100] * 25
    assert mean_change(*scores, 0.99, seed=5) == mean_change(*scores, 0.99, seed=5)


def test_all_limits_together_keep_the_confidence():
    assert level_of(0.95, 1) == pytest.approx(0.95) and level_of(0.95, 10) == pytest.approx(0.995)


def test_as_many_examples_as_it_says_would_decide_with_a_power_of_80_percent():
    draw = random.Random(2)

    def flips(n: int) -> tuple[list[int], list[int]]:
        """A true drop of 4 points: 8 % of answers get worse, 4 % better."""
        before = [draw.choice([0, 100]) for _ in range(n)]
        rate = {100: 0.16, 0: 0.08}
        return before, [100 - score if draw.random() < rate[score] else score for score in before]

    # At the true change and spread.
    spread = math.sqrt(0.12 - 0.04**2) * 100
    z = NormalDist().inv_cdf(0.95) + NormalDist().inv_cdf(0.8)
    n = math.ceil((z * spread / (4 - 2)) ** 2)
    broken = sum(mean_change(*flips(n), 0.95).outcome(-2) is Outcome.BROKEN for _ in range(120))
    assert 0.68 <= broken / 120 <= 0.92
    estimates = [mean_change(*flips(800), 0.95).examples(-20) for _ in range(3)]
    assert all(estimate < 100 for estimate in estimates), "a distant limit needs few"
    assert mean_change([100] * 49 + [0], [0] + [100] * 48 + [100], 0.95).examples(0) is None


def test_a_score_that_is_no_mean_is_computed_on_every_sample():
    draw = random.Random(3)
    truth = [draw.random() < 0.5 for _ in range(400)]
    first = [t if draw.random() < 0.9 else not t for t in truth]
    second = [t if draw.random() < 0.7 else not t for t in truth]

    def f1(rows, said):
        hits = sum(truth[i] and said[i] for i in rows)
        return 200 * hits / (sum(truth[i] for i in rows) + sum(said[i] for i in rows))

    change = rescored_change(lambda rows: (f1(rows, first), f1(rows, second)), 400, 0.95)
    assert change.points == pytest.approx(f1(range(400), second) - f1(range(400), first))
    # Standard error of F1's difference by the jackknife.
    leave = [
        f1(rest, second) - f1(rest, first) for k in range(400) for rest in [[i for i in range(400) if i != k]]
    ]
    jackknife = math.sqrt(399 * pstdev(leave) ** 2)
    assert change.error == pytest.approx(jackknife, rel=0.2)
    assert change.outcome(-5) is Outcome.BROKEN
    with pytest.raises(EvalError, match="at least 30.*got 12"):
        rescored_change(lambda rows: (0, 0), 12, 0.95)


def test_unpaired_and_infinite_scores_are_refused():
    with pytest.raises(EvalError, match="2 scores before and 1 after"):
        mean_change([1, 2], [1], 0.95)
    with pytest.raises(EvalError, match="not finite"):
        mean_change([1, math.nan], [1, 2], 0.95)
