"""The principal subspace of a pre-trained weight, by the cheapest method that suffices.

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
from llava_keeplora.subspace.truncated import GRAM_ENERGY, gram_matrix, leading_eigenpairs

Method = Literal["auto", "svd", "gram", "randomized"]


@dataclass(frozen=True)
class PrincipalBasis:
    """The principal subspace of one weight.

    Args:
        basis: (in, k) float32, orthonormal columns in order of descending singular value.
        energy: the fraction of ||W||_F^2 inside the span, in [0, 1]; 1 for a zero weight.
        rank: k.
        method: the method that was used: `svd`, `gram` or `randomized`.
    """

    basis: Tensor
    energy: float
    rank: int
    method: str


def principal_basis(
    weight: Float[Tensor, "out in"],
    energy: float,
    *,
    method: Method = "auto",
    strict: bool = False,
    seed: int = 0,
) -> PrincipalBasis:
    """Return the first p right singular vectors of a weight, with the smallest p that reaches the energy.

    Source: KeepLoRA (arXiv 2601.19659), W_p: the left singular vectors of the paper's W^T at epsilon_w.

    Args:
        weight: W, (out, in), any floating dtype; computed in float32 or higher precision.
        energy: epsilon_w, in (0, 1].
        method: `svd` (the reference); `gram`, all eigenvectors of the smaller Gram matrix; `randomized`, only
            its leading ones, with a fallback to `gram` if they leave the rank in doubt or are too many to
            save time; `auto`, `randomized` up to energy 0.999 and `svd` beyond.
        strict: the released code's `<` rule, one vector fewer.
        seed: seed of the randomised method, which changes the result by rounding only.

    Returns:
        the basis; k = 0 for a zero weight.

    Raises:
        EnergyError: if the energy is outside (0, 1].
        ShapeError: if the weight isn't a matrix or the method is unknown.
        NonFiniteError: if the weight holds NaN or infinity.
    """
    check_energy(energy)
    if weight.ndim != 2:
        raise ShapeError(f"a weight must be a matrix (out, in), but it has shape {tuple(weight.shape)}")
    if method not in ("auto", "svd", "gram", "randomized"):
        raise ShapeError(f"method must be auto, svd, gram or randomized, but it is {method!r}")
    check_finite(weight, "weight")
    weight = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    largest = torch.linalg.vector_norm(weight, float("inf")) if weight.numel() else weight.new_zeros(())
    if not largest:
        return PrincipalBasis(empty_basis(weight.shape[1], device=weight.device), 1.0, 0, "svd")
    # Scaled, because squares of very small or large weights would leave float32's range.
    weight = (weight / largest).float()
    if method == "svd" or (method == "auto" and energy > GRAM_ENERGY):
        return _by_svd(weight, energy, strict)
    return _by_gram(weight, energy, strict, truncate=method != "gram", seed=seed)


def _by_svd(weight: Tensor, energy: float, strict: bool) -> PrincipalBasis:
    _, singular, right = torch.linalg.svd(weight, full_matrices=False)
    squared = singular.double().square()
    rank = energy_rank(squared, energy, strict=strict)
    return PrincipalBasis(
        right[:rank].T.contiguous(), float(squared[:rank].sum() / squared.sum()), rank, "svd"
    )


def _by_gram(weight: Tensor, energy: float, strict: bool, truncate: bool, seed: int) -> PrincipalBasis:
    """Use eigenvectors of the smaller Gram matrix: a leading block of them if that suffices, else all."""
    tall = weight.shape[0] >= weight.shape[1]
    factor = weight if energy <= GRAM_ENERGY else weight.double()
    gram = gram_matrix(factor if tall else factor.T)
    total = float(gram.diagonal().double().sum())
    leading = leading_eigenpairs(gram, energy, total, seed) if truncate and energy <= GRAM_ENERGY else None
    if leading is None:
        values, vectors = torch.linalg.eigh(gram)
        squared, vectors = values.flip(0).double().clamp_min(0.0), vectors.flip(1)
        # The sum of the whole spectrum is consistent with its prefixes, unlike the trace with its rounding.
        total = float(squared.sum())
    else:
        squared, vectors = leading
    rank = energy_rank(squared, energy, total=total, strict=strict)
    vectors = vectors[:, :rank]
    basis = vectors if tall else torch.linalg.qr(factor.T @ vectors).Q
    held = float(squared[:rank].sum()) / total
    method = "gram" if leading is None else "randomized"
    return PrincipalBasis(basis.float().contiguous(), held, rank, method)
