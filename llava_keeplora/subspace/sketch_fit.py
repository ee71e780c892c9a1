"""Fits of a gradient sketch: G_hat ~ Q B from one or two passes, and the energies that the rows estimate.

Shapes and sources are those of `gradient_sketch`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llava_keeplora.subspace.sketch_bounds import chi_square_factors, fit_error

# Groups of rows that take turns at judging directions found without them.
FOLDS = 4


class SketchFit(NamedTuple):
    """G_hat ~ Q factor, and per row of Psi unbiased estimates of two energies: that of A, and the whole.

    optimum is the energy of the best r directions for the fit, which is biased upwards. error bounds ||factor
    - Q^T G_hat||_F, and most the energy of the best r directions of G_hat.
    """

    factor: Tensor
    captured: Tensor
    energy: Tensor
    optimum: float
    error: float
    most: float


def fit_one_pass(rows: Float[Tensor, "l in"], seen: Float[Tensor, "l w"], rank: int) -> SketchFit:
    """Return the least squares solution of Psi Q B = Psi G_hat, for as many columns of Q as serve A best.

    Each further column lets B follow the tail of G_hat more closely, and lets more of the tail's noise in;
    rows that had no part in the solution decide where to stop.
    """
    gram = rows @ rows.T
    width = seen.shape[1]
    depths = [depth for depth in (rank * 2**step for step in range(32)) if depth < width] + [width]
    # Many problems of a few dozen numbers a side: solved on the host before a GPU has started the first.
    small, columns = gram.cpu(), seen.cpu()
    judged = {depth: _cross_fitted(small, columns[:, :depth], rank) for depth in depths}
    depth = max(depths, key=lambda depth: float(judged[depth].plain.sum()))
    factor = torch.linalg.lstsq(seen[:, :depth], rows).solution
    missed = rows - seen[:, :depth] @ factor
    optimum = _leading_energy(torch.cat([factor, missed / (len(rows) - depth) ** 0.5]), rank)
    error, outside = fit_error(seen[:, :depth], missed)
    # The root of the r leading energies is a norm, so it is off by no more than the factor is.
    most = (float(torch.linalg.svdvals(factor)[:rank].norm()) + error) ** 2 + outside
    return SketchFit(factor, judged[depth].captured, judged[depth].energy, optimum, error, most)


class _Judged(NamedTuple):
    """Per row of Psi, for A and B found without the row.

    |psi G_hat A|^2, and less noisy estimates of two energies.
    """

    plain: Tensor
    captured: Tensor
    energy: Tensor


def _cross_fitted(gram: Float[Tensor, "l l"], seen: Float[Tensor, "l d"], rank: int) -> _Judged:
    """Return what rows say of directions that were found without them, in terms of W W^T alone.

    The energy of Q B A is known exactly, and a row only corrects it:
    ||G_hat A||^2 = ||Q B A||^2 + E (|psi G_hat A|^2 - |psi Q B A|^2); likewise without A.
    """
    fold = torch.arange(len(gram), device=gram.device) % FOLDS
    plain, captured, energy = gram.new_empty(3, len(gram))
    for turn in range(FOLDS):
        kept, judge = (fold != turn).nonzero().squeeze(1), (fold == turn).nonzero().squeeze(1)
        q, r = torch.linalg.qr(seen[kept])
        solve = torch.linalg.solve_triangular(r, q.T, upper=True)
        squared, vectors = torch.linalg.eigh(solve @ gram[kept][:, kept] @ solve.T)
        squared = squared.clamp_min(0.0)
        predicted = (seen[judge] @ vectors).square() * squared
        # A direction without energy holds none of the row's either.
        inverse = torch.where(squared > 1e-14 * squared[-1], squared.rsqrt(), 0.0)[-rank:]
        plain[judge] = (gram[judge][:, kept] @ (solve.T @ vectors[:, -rank:]) * inverse).square().sum(1)
        captured[judge] = squared[-rank:].sum() + plain[judge] - predicted[:, -rank:].sum(1)
        energy[judge] = squared.sum() + gram.diagonal()[judge] - predicted.sum(1)
    return _Judged(plain, captured, energy)


def fit_two_passes(
    rows: Float[Tensor, "l in"], seen: Float[Tensor, "l w"], factor: Float[Tensor, "w in"], rank: int
) -> SketchFit:
    """Return B = Q^T G_hat, which is exact; the rows, independent of Q, estimate what lies outside Q."""
    missed = rows - seen @ factor
    directions = torch.linalg.svd(factor, full_matrices=False)
    captured = directions.S[:rank].square().sum() + (missed @ directions.Vh[:rank].T).square().sum(1)
    energy = factor.square().sum() + missed.square().sum(1)
    optimum = _leading_energy(torch.cat([factor, missed / len(rows) ** 0.5]), rank)
    # The best r directions V hold ||factor V||^2 + ||M V||^2, and the rows tell the latter for this one V,
    # which no row decides.
    least = chi_square_factors(len(rows))[0]
    most = _leading_energy(torch.cat([factor, missed / (least * len(rows)) ** 0.5]), rank)
    return SketchFit(factor, captured, energy, optimum, 0.0, most)


def _leading_energy(tall: Float[Tensor, "m in"], rank: int) -> float:
    """Return the sum of the r largest squared singular values."""
    return float(torch.linalg.eigvalsh((tall @ tall.T).cpu())[-rank:].clamp_min(0.0).sum())


def ratio_of_means(part: Float[Tensor, " l"], whole: Float[Tensor, " l"]) -> tuple[float, float]:
    """Return the ratio of two means over the same rows, and its standard error to first order."""
    mean = whole.mean().clamp_min(torch.finfo(whole.dtype).tiny)
    ratio = part.mean() / mean
    return float(ratio), float((part - ratio * whole).std() / (mean * len(part) ** 0.5))


def root_mean_square(rows: Float[Tensor, "l in"]) -> float:
    """Return ||G||_F as estimated from the rows of Psi G."""
    return float(rows.norm() / len(rows) ** 0.5)


def orthonormal_range(sketch: Float[Tensor, "out w"]) -> Float[Tensor, "out w"]:
    """Return Q: orthonormal columns that span Y, strongest first, in float64."""
    q, r = torch.linalg.qr(sketch.double())
    return q @ torch.linalg.svd(r).U
