"""Fits of a gradient sketch, G_hat ~ Q B, from one or two passes, with estimates of energies from the rows.

Shapes and sources are those of `gradient_sketch`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llava_keeplora.subspace.sketch_bounds import chi_square_factors, fit_error

# Number of folds of the cross-validation of directions over the rows.
FOLDS = 4


class SketchFit(NamedTuple):
    """A fit G_hat ~ Q factor, and estimates of its quality.

    Args:
        factor: B, (w, in).
        captured: unbiased estimates of the energy of A, one per row of Psi.
        energy: unbiased estimates of the total energy, one per row of Psi.
        optimum: energy of the best r directions of the fit, which is biased upwards.
        error: upper bound of ||factor - Q^T G_hat||_F.
        most: upper bound of the energy of the best r directions of G_hat.
    """

    factor: Tensor
    captured: Tensor
    energy: Tensor
    optimum: float
    error: float
    most: float


def fit_one_pass(rows: Float[Tensor, "l in"], seen: Float[Tensor, "l w"], rank: int) -> SketchFit:
    """Return the least squares solution of Psi Q B = Psi G_hat, for the best number of columns of Q.

    Each further column lets B follow the tail of G_hat more closely, but adds noise of the tail; the number
    is chosen by cross-validation over the rows.
    """
    gram = rows @ rows.T
    width = seen.shape[1]
    depths = [depth for depth in (rank * 2**step for step in range(32)) if depth < width] + [width]
    # Many problems of a few dozen numbers per side, which the host solves faster than a GPU.
    small, columns = gram.cpu(), seen.cpu()
    estimates = {depth: _cross_validate(small, columns[:, :depth], rank) for depth in depths}
    depth = max(depths, key=lambda depth: float(estimates[depth].direct.sum()))
    factor = torch.linalg.lstsq(seen[:, :depth], rows).solution
    missed = rows - seen[:, :depth] @ factor
    optimum = _leading_energy(torch.cat([factor, missed / (len(rows) - depth) ** 0.5]), rank)
    error, outside = fit_error(seen[:, :depth], missed)
    # The root of the r leading energies is a norm, so its error is at most that of the factor.
    most = (float(torch.linalg.svdvals(factor)[:rank].norm()) + error) ** 2 + outside
    chosen = estimates[depth]
    return SketchFit(factor, chosen.captured, chosen.energy, optimum, error, most)


class _RowEstimates(NamedTuple):
    """Estimates of energies, one per row of Psi, with A and B fitted without the row.

    Args:
        direct: |psi G_hat A|^2.
        captured: a less noisy estimate of ||G_hat A||^2.
        energy: a less noisy estimate of ||G_hat||^2.
    """

    direct: Tensor
    captured: Tensor
    energy: Tensor


def _cross_validate(gram: Float[Tensor, "l l"], seen: Float[Tensor, "l d"], rank: int) -> _RowEstimates:
    """Estimate energies from rows that were left out of the fit, in terms of W W^T alone.

    The energy of Q B A is known exactly, and a row only corrects it:
    ||G_hat A||^2 = ||Q B A||^2 + E (|psi G_hat A|^2 - |psi Q B A|^2); likewise without A.
    """
    folds = torch.arange(len(gram), device=gram.device) % FOLDS
    direct, captured, energy = gram.new_empty(3, len(gram))
    for fold in range(FOLDS):
        fitted, held_out = (folds != fold).nonzero().squeeze(1), (folds == fold).nonzero().squeeze(1)
        q, r = torch.linalg.qr(seen[fitted])
        solve = torch.linalg.solve_triangular(r, q.T, upper=True)
        squared, vectors = torch.linalg.eigh(solve @ gram[fitted][:, fitted] @ solve.T)
        squared = squared.clamp_min(0.0)
        predicted = (seen[held_out] @ vectors).square() * squared
        # A direction without energy holds none of the row's either.
        inverse = torch.where(squared > 1e-14 * squared[-1], squared.rsqrt(), 0.0)[-rank:]
        products = gram[held_out][:, fitted] @ (solve.T @ vectors[:, -rank:]) * inverse
        direct[held_out] = products.square().sum(1)
        captured[held_out] = squared[-rank:].sum() + direct[held_out] - predicted[:, -rank:].sum(1)
        energy[held_out] = squared.sum() + gram.diagonal()[held_out] - predicted.sum(1)
    return _RowEstimates(direct, captured, energy)


def fit_two_passes(
    rows: Float[Tensor, "l in"], seen: Float[Tensor, "l w"], factor: Float[Tensor, "w in"], rank: int
) -> SketchFit:
    """Return the fit with B = Q^T G_hat, which is exact; the rows, independent of Q, estimate the rest."""
    missed = rows - seen @ factor
    directions = torch.linalg.svd(factor, full_matrices=False)
    captured = directions.S[:rank].square().sum() + (missed @ directions.Vh[:rank].T).square().sum(1)
    energy = factor.square().sum() + missed.square().sum(1)
    optimum = _leading_energy(torch.cat([factor, missed / len(rows) ** 0.5]), rank)
    # The best r directions V hold ||factor V||^2 + ||M V||^2, and the rows, on which V does not depend, bound
    # the latter.
    least = chi_square_factors(len(rows))[0]
    most = _leading_energy(torch.cat([factor, missed / (least * len(rows)) ** 0.5]), rank)
    return SketchFit(factor, captured, energy, optimum, 0.0, most)


def _leading_energy(tall: Float[Tensor, "m in"], rank: int) -> float:
    """Return the sum of the r largest squared singular values."""
    return float(torch.linalg.eigvalsh((tall @ tall.T).cpu())[-rank:].clamp_min(0.0).sum())


def ratio_of_means(part: Float[Tensor, " l"], total: Float[Tensor, " l"]) -> tuple[float, float]:
    """Return the ratio of two means over the same rows, and its standard error to first order."""
    mean = total.mean().clamp_min(torch.finfo(total.dtype).tiny)
    ratio = part.mean() / mean
    return float(ratio), float((part - ratio * total).std() / (mean * len(part) ** 0.5))


def root_mean_square(rows: Float[Tensor, "l in"]) -> float:
    """Return an estimate of ||G||_F from the rows of Psi G."""
    return float(rows.norm() / len(rows) ** 0.5)


def orthonormal_range(sketch: Float[Tensor, "out w"]) -> Float[Tensor, "out w"]:
    """Return Q, orthonormal columns that span Y, in order of descending singular value, in float64."""
    q, r = torch.linalg.qr(sketch.double())
    return q @ torch.linalg.svd(r).U
