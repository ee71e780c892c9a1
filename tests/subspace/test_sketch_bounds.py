"""Bounds of sketched directions against the float64 truth, whatever the spectrum."""

import math

import pytest
import torch

RANK, OUT, IN, PROTECTED = 4, 48, 64, 16


def spectra():
    """Singular values of gradients that are hard to sketch: flat, falling, with a step anywhere, and with a spike just outside the sketch."""
    index, width = torch.arange(1, OUT + 1, dtype=torch.float64), RANK + 8
    yield torch.ones(OUT, dtype=torch.float64)
    yield from (index**-exponent for exponent in (0.3, 1.0, 2.0))
    yield from (ratio**index for ratio in (0.3, 0.9))
    for step in (1, RANK - 1, RANK, RANK + 1, width - 1, width, width + 1):
        yield from (torch.where(index <= step, 1.0, low).double() for low in (1e-1, 1e-3, 1e-6))
    yield torch.where(index <= width, 1.0, torch.where(index == width + 1, 0.99, 1e-4)).double()


def answers(sub, gradient, basis, seed):
    """Directions after one, two and four passes."""
    batch = (torch.eye(IN), gradient.T.contiguous())
    sketch = sub.GradientSketch(OUT, IN, sub.sketch_width(RANK), basis, seed=seed)
    sketch.add(*batch)
    yield sketch.directions(RANK, allow_fewer=True)
    for _ in range(2):
        second = sketch.second_pass()
        second.add(*batch)
        yield sketch.directions(RANK, second, allow_fewer=True)
        sketch = sketch.refined(second)
        sketch.add(*batch)


def test_bounds_hold_for_every_spectrum_basis_and_seed(plain, with_spectrum, random_basis):
    for number, singular in enumerate(spectra()):
        for seed in range(3):
            gradient = with_spectrum(OUT, IN, singular, 100 * number + seed).float()
            basis = random_basis(IN, PROTECTED, seed)
            if seed == 2:  # Nearly all of the gradient lies inside the basis.
                gradient = gradient @ basis @ basis.T + 1e-3 * gradient
            whole = gradient.double()
            residual = whole - whole @ basis.double() @ basis.double().T
            squared = torch.linalg.svdvals(residual).square()
            share = float(squared.sum() / whole.square().sum())
            for found in answers(plain, gradient, basis, seed):
                held = float((residual @ found.A.double()).square().sum() / squared[: found.A.shape[1]].sum())
                where = (number, seed, found.passes)
                assert 0.0 <= found.at_least <= held, where
                assert found.residual_bounds[0] <= share <= found.residual_bounds[1], where
                assert found.residual_bounds[0] <= found.residual_energy <= found.residual_bounds[1], where


def test_bounds_are_near_the_truth_where_the_sketch_holds_the_gradient(plain, with_spectrum, random_basis):
    gradient, basis = with_spectrum(OUT, IN, 0.3 ** torch.arange(OUT)).float(), random_basis(IN, PROTECTED)
    one, two, _ = answers(plain, gradient, basis, 0)
    assert one.at_least > 0.98 and two.at_least > 0.9999
    assert two.residual_bounds[1] - two.residual_bounds[0] < 1e-4


@pytest.mark.parametrize("rows", [1, 19, 49, 193])
def test_a_factor_is_missed_with_no_more_than_the_stated_chance(rows):
    from llava_keeplora.subspace.sketch_bounds import chi_square_factors

    least, most = chi_square_factors(rows, 1e-3)
    half = torch.tensor(rows / 2, dtype=torch.float64)
    below, above = (
        float(tail(half, half * x))
        for tail, x in ((torch.special.gammainc, least), (torch.special.gammaincc, most))
    )
    assert 1e-5 < below <= 1e-3 and 1e-6 < above <= 1e-3 and least < 1.0 < most
    for factor in (least, most):
        assert (factor * math.exp(1.0 - factor)) ** (rows / 2) == pytest.approx(1e-3, rel=1e-6)


def test_no_spectrum_strays_further_than_a_single_direction():
    """The proof's step: a mean of weighted squares is in the tails of chi^2 most often where one weight is all."""
    from llava_keeplora.subspace.sketch_bounds import chi_square_factors

    least, most = chi_square_factors(19, 1e-2)
    squares = torch.randn(20_000, 19, 4, generator=torch.Generator().manual_seed(0)).square()
    for weights in ([1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.7, 0.2, 0.05, 0.05]):
        means = (squares * torch.tensor(weights)).sum(2).mean(1)
        assert float((means < least).float().mean()) < 1e-2 and float((means > most).float().mean()) < 1e-2
