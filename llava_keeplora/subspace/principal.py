"""The principal subspace of a pre-trained weight, by the cheapest route that answers.

Shapes: weight W (out, in), basis (in, k): the first k right singular vectors of W.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llava_keeplora.subspace.basis import check_finite, empty_basis
from llava_keeplora.subspace.energy import check_energy, energy_rank
from llava_keeplora.subspace.errors import ShapeError

Method = Literal["auto", "svd", "gram", "randomized"]


@dataclass(frozen=True)
class PrincipalBasis:
    """The principal subspace of one weight.

    Args:
        basis: (in, k) float32, orthonormal columns in order of falling singular value.
        energy: the share of ||W||_F^2 inside the span, in [0, 1]; 1 for a zero weight.
        rank: k.
        method: the route that was taken: `svd`, `gram` or `randomized`.
    """

    basis: Tensor
    energy: float
    rank: int
    method: str


def principal_basis(
    weight: Float[Tensor, "out in"], energy: float, *, method: Method = "auto", strict: bool = False, seed: int = 0
) -> PrincipalBasis:
    """First p right singular vectors of a weight, p the smallest number that reaches the energy.

    Source: KeepLoRA (arXiv 2601.19659), W_p: the left singular vectors of the paper's W^T at epsilon_w.

    Args:
        weight: W, (out, in), any floating dtype; the work is done in float32 or better.
        energy: epsilon_w, in (0, 1].
        method: `svd` (reference), `gram` (eigenvectors of the smaller Gram matrix), `randomized` (truncated), or
            `auto`, the fastest of them that gives the same rank.
        strict: the released code's `<` rule, one vector fewer.
        seed: of the randomised route's start; it moves the answer by rounding only.

    Returns:
        The basis; a zero weight has nothing to protect and gives k = 0.

    Raises:
        EnergyError: if the energy is outside (0, 1].
        ShapeError: if the weight isn't a matrix or the method is unknown.
        NonFiniteError: if the weight holds NaN or infinity.
    """
    check_energy(energy)
    if weight.ndim != 2:
        raise ShapeError(f"a weight must be a matrix (out, in), but it has shape {tuple(weight.shape)}")
    check_finite(weight, "weight")
    if method not in ("auto", "svd", "gram", "randomized"):
        raise ShapeError(f"method must be auto, svd, gram or randomized, but it is {method!r}")
    weight = weight.detach().float()
    if not weight.any():
        return PrincipalBasis(empty_basis(weight.shape[1], device=weight.device), 1.0, 0, "svd")
    return _by_svd(weight, energy, strict) if method == "svd" else _by_gram(weight, energy, strict)


def _by_svd(weight: Tensor, energy: float, strict: bool) -> PrincipalBasis:
    _, singular, right = torch.linalg.svd(weight, full_matrices=False)
    squared = singular.double().square()
    rank = energy_rank(squared, energy, strict=strict)
    return PrincipalBasis(right[:rank].T.contiguous(), float(squared[:rank].sum() / squared.sum()), rank, "svd")


def _by_gram(weight: Tensor, energy: float, strict: bool) -> PrincipalBasis:
    out_dim, in_dim = weight.shape
    wide = weight.double()
    values, vectors = torch.linalg.eigh(wide.T @ wide if in_dim <= out_dim else wide @ wide.T)
    squared = values.flip(0).clamp_min(0.0)
    rank = energy_rank(squared, energy, strict=strict)
    top = vectors.flip(1)[:, :rank]
    basis = top if in_dim <= out_dim else torch.linalg.qr(wide.T @ top).Q
    return PrincipalBasis(basis.float().contiguous(), float(squared[:rank].sum() / squared.sum()), rank, "gram")
