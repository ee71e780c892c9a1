"""The feature directions that a finished task adds to the protected subspace.

Shapes: C = X^T X (in, in), basis U (in, k), new directions (in, m), in = the layer's input width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llava_keeplora.subspace.basis import check_basis, check_finite, orthonormalize_against
from llava_keeplora.subspace.energy import check_energy, energy_rank
from llava_keeplora.subspace.errors import ShapeError
from llava_keeplora.subspace.truncated import GRAM_ENERGY, leading_eigenpairs

# Singular values of sums of float32 products below this fraction of the norm are rounding errors; observed
# ones reach a fifth of it.
NOISE = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class FeatureDirections:
    """The directions that a task's features add to a layer's basis.

    Args:
        new: (in, m) float32, orthonormal, orthogonal to the basis; m may be 0.
        energy_before: fraction of the features' energy inside the basis, in [0, 1]; 1 if there is no energy.
        energy_after: fraction inside the basis and the new directions together, exact to 1e-4.
        rank: m.
    """

    new: Tensor
    energy_before: float
    energy_after: float
    rank: int


def feature_directions(
    second_moment: Float[Tensor, "in in"],
    basis: Float[Tensor, "in k"],
    energy: float,
    limit: int | None = None,
    least: float = 0.0,
) -> FeatureDirections:
    """Return the fewest residual feature directions with which the basis reaches the energy of the features.

    The right singular vectors of X (I - U U^T) are the eigenvectors of (I - U U^T) C (I - U U^T), so the
    features themselves aren't needed. If their spectrum decays fast, a leading block of eigenvectors is
    computed; otherwise all of them, inside the (in - k)-dimensional complement of U.

    Source: KeepLoRA (arXiv 2601.19659), the feature step at epsilon_f; Gradient Projection Memory (Saha et
    al., ICLR 2021, equation 9).

    Args:
        second_moment: C = X^T X, (in, in), symmetric.
        basis: U, (in, k), orthonormal columns; k may be 0.
        energy: epsilon_f, in (0, 1].
        limit: the most directions, of which the strongest are taken; no limit when None.
        least: fraction of the energy of all features that a direction must exceed to be taken.

    Raises:
        EnergyError: if the energy is outside (0, 1].
        ShapeError: if C isn't square or the basis doesn't fit it.
        NonFiniteError: if C holds NaN or infinity.
    """
    check_energy(energy)
    dim = second_moment.shape[0]
    if second_moment.shape != (dim, dim):
        raise ShapeError(f"a second moment must be square, but it is {tuple(second_moment.shape)}")
    check_basis(basis, dim, "features")
    check_finite(second_moment, "second moment of the features")
    moment, tall = second_moment.detach().double(), basis.detach().double()
    total = float(moment.trace())
    # Features that are orthogonal to the basis have a captured energy of rounding errors of either sign.
    captured = max(0.0, float((tall * (moment @ tall)).sum()))
    if total <= 0.0 or energy_rank(moment.diagonal()[:1], energy, total=total, captured=captured) == 0:
        fraction = captured / total if total > 0.0 else 1.0
        return FeatureDirections(basis.new_zeros(dim, 0, dtype=torch.float32), fraction, fraction, 0)
    squared, directions = _leading_outside(moment, tall, energy * total - captured)
    rank = limited(energy_rank(squared, energy, total=total, captured=captured), limit)
    rank = min(rank, above(squared, least * total))
    new = orthonormalize_against(basis, directions[:, :rank]).float()
    after = min(1.0, (captured + float(squared[:rank].sum())) / total)
    return FeatureDirections(new.contiguous(), captured / total, after, rank)


def leading_directions(
    columns: Float[Tensor, "in n"], basis: Float[Tensor, "in k"], rank: int
) -> Float[Tensor, "in r"]:
    """Return the first `rank` left singular vectors of (I - U U^T) Y.

    The columns of Y are features or sums of them.

    Source: InfLoRA (arXiv 2404.00228), the design of the dimensionality reduction matrix, with Y = X^T X.

    Args:
        columns: Y, (in, n).
        basis: U, (in, k), orthonormal columns; k may be 0.
        rank: r; fewer are returned if the residual has fewer above the rounding of float32 sums.

    Returns:
        (in, r) float32, orthonormal, orthogonal to the basis, in order of descending singular value.

    Raises:
        ShapeError: if the basis doesn't fit.
        NonFiniteError: if Y holds NaN or infinity.
    """
    check_basis(basis, len(columns), "features")
    check_finite(columns, "matrix of the features")
    columns = columns.detach().double()
    complement = _complement(basis.detach().double())
    outside = complement.T @ columns
    squared, vectors = torch.linalg.eigh(outside @ outside.T)
    count = int((squared > (NOISE * columns.norm()) ** 2).sum())
    return (complement @ vectors.flip(1)[:, : min(rank, count)]).float().contiguous()


def limited(rank: int, limit: int | None) -> int:
    """Return the smaller of a rank and a limit, if there is one."""
    return rank if limit is None else min(rank, limit)


def above(squared: Float[Tensor, " n"], threshold: float) -> int:
    """Return how many squared singular values exceed a threshold; all for a threshold of 0."""
    return int((squared > threshold).sum()) if threshold else len(squared)


def _leading_outside(
    moment: Float[Tensor, "in in"], basis: Float[Tensor, "in k"], wanted: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, "in n"]]:
    """Return energies (descending) and directions of the residual moment: enough to hold `wanted`, or all."""
    image = moment @ basis
    # (I - U U^T) C (I - U U^T), symmetric by construction.
    half_update = image - basis @ (basis.T @ image / 2)
    outside = moment - basis @ half_update.T - half_update @ basis.T
    scale = float(outside.diagonal().max())
    left = float(outside.trace())
    if scale > 0.0 and wanted <= GRAM_ENERGY * left:
        leading = leading_eigenpairs((outside / scale).float(), wanted / left, left / scale, seed=0)
        if leading is not None:
            return leading[0] * scale, leading[1].double()
    # In a basis of the complement, so that rounding cannot reintroduce protected directions.
    complement = _complement(basis)
    values, vectors = torch.linalg.eigh(complement.T @ (outside @ complement))
    return values.flip(0).clamp_min(0.0), complement @ vectors.flip(1)


def _complement(basis: Float[Tensor, "in k"]) -> Float[Tensor, "in in_minus_k"]:
    """Return orthonormal columns that span the orthogonal complement of the basis."""
    dim, rank = basis.shape
    if rank == 0:
        return torch.eye(dim, dtype=basis.dtype, device=basis.device)
    return torch.linalg.qr(basis, mode="complete").Q[:, rank:]
