"""The directions in which a weight does the least: the tail of its singular value decomposition.

Shapes: weight W (out, in), left directions U (out, n), right directions V (in, n).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llava_keeplora.subspace.basis import check_finite
from llava_keeplora.subspace.energy import energy_rank
from llava_keeplora.subspace.errors import ShapeError


@dataclass(frozen=True)
class SpectralTail:
    """The weakest singular directions of one weight, beyond its principal ones.

    Args:
        left: U_n, (out, n), orthonormal columns, in order of descending singular value.
        right: V_n, (in, n), orthonormal columns, likewise.
        principal: k, the number of principal directions; n is at most min(out, in) - k.
    """

    left: Tensor
    right: Tensor
    principal: int


def spectral_tail(weight: Float[Tensor, "out in"], energy: float, rank: int) -> SpectralTail:
    """Return the last `rank` pairs of singular vectors outside of those that reach the energy.

    Source: NuSA-CL (arXiv 2510.21175), the approximate null space of a weight.

    Args:
        weight: W, (out, in), any floating dtype; computed in float32 or higher precision.
        energy: rho, in (0, 1], the fraction of ||W||_F^2 that the principal directions reach.
        rank: r, the most pairs; fewer are returned if fewer are left. All are principal at energy 1, but for
            those whose singular value is 0.

    Raises:
        EnergyError: if the energy is outside (0, 1].
        ShapeError: if the weight isn't a matrix.
        NonFiniteError: if the weight holds NaN or infinity.
    """
    if weight.ndim != 2:
        raise ShapeError(f"a weight must be a matrix (out, in), but it has shape {tuple(weight.shape)}")
    check_finite(weight, "weight")
    weight = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    principal = energy_rank(S.double().square(), energy)
    first = max(principal, len(S) - rank)
    return SpectralTail(U[:, first:].contiguous(), Vh[first:].T.contiguous(), principal)
