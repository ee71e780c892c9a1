"""Bytes that the subspaces' computations take for one layer beside what they are given, tensor by tensor.

They look at values (how many directions reach an energy), so they can't be rehearsed on fake tensors; each
function lists what is alive at the most expensive moment of the code that it names, on its most expensive
way.

Legend: in / out features of a layer, n = min(in, out), k columns of a basis, r rank, w sketch width.
"""

from __future__ import annotations

import math
from functools import cache

from llava_keeplora.subspace import GradientSketch

F32, F64 = 4, 8
#: LAPACK's and cuSOLVER's divide-and-conquer eigensolvers work in twice the matrix beside the eigenvectors.
EIGENSOLVER = 2
#: Share of a layer's input width that a task adds to its basis; what tasks really add depends on them.
GROWTH = 0.02
STEPS = 2000


def weight_basis(out_dim: int, in_dim: int, columns: int, size: int) -> int:
    """`subspace/principal.py`, from a weight of `size` bytes per number.

    The weight in fp32 (twice while it is scaled), its Gram matrix, the eigenvectors and the eigensolver's
    work, or Ritz blocks of up to a third of that size six times; for a wide weight the vectors mapped to the
    input side and their QR.
    """
    n, weight = min(out_dim, in_dim), out_dim * in_dim
    scaling = F32 * weight * (1 if size == F32 else 2)
    solving = F32 * (weight + (2 + EIGENSOLVER) * n * n)
    mapping = F32 * (weight + 3 * n * n + 3 * in_dim * columns) if out_dim < in_dim else 0
    return max(scaling, solving, mapping)


def feature_directions(in_dim: int, columns: int, exact: bool) -> int:
    """Return the bytes that `subspace/features.py` takes, from an exact second moment.

    These are the residual moment and one more of its size while it is formed; then the complement of the
    basis, its image, the small problem, its eigenvectors and the work, in fp64.

    Args:
        in_dim: in.
        columns: k.
        exact: whether the moment is kept in fp64 (else it is copied into it first).
    """
    left = in_dim - columns
    copied = 0 if exact else in_dim**2
    forming = 3 * in_dim**2 + 3 * in_dim * columns
    solving = in_dim**2 + 2 * in_dim * columns + 2 * in_dim * left + (2 + EIGENSOLVER) * left**2
    return F64 * (copied + max(forming, solving))


def sketched_feature_directions(in_dim: int, size: int) -> int:
    """`subspace/feature_sketch.py`.

    Test vectors, residual image, factor, its singular vectors, and their copy in the result.
    """
    return F64 * 6 * in_dim * size


def gradient_directions(out_dim: int, in_dim: int, width: int | None) -> int:
    """Bytes of a layer's gradient, held whole or sketched.

    See `subspace/gradients.py` and `subspace/gradient_sketch.py`.

    Whole: the gradient and its residual in fp64 and one more while that is formed, or the Gram matrix with
    its eigenvectors
    and the work. Sketched: rows and their residual, Psi, the range and its QR, factor, misses and singular
    vectors in fp64.

    Args:
        out_dim, in_dim: out, in.
        width: w; None for a method that asks for the whole gradient. A sketch that is no smaller is not made
            either.
    """
    n = min(out_dim, in_dim)
    if width is None or not GradientSketch.is_worth_it(out_dim, in_dim, width):
        return F64 * max(3 * out_dim * in_dim, 2 * out_dim * in_dim + (2 + EIGENSOLVER) * n * n)
    rows = 2 * min(width, n) + 1
    return F64 * (rows * (4 * in_dim + out_dim) + 3 * min(width, n) * out_dim)


@cache
def random_rank(out_dim: int, in_dim: int, energy: float) -> int:
    """How many singular vectors of a random matrix hold a share of its energy.

    A trained weight's spectrum is no flatter.

    Source: the Marchenko-Pastur law (1967). With x = 1 + q − 2√q cos θ, q = n / max(in, out), the eigenvalues
    of W Wᵀ have the energy (θ − sin θ cos θ) / π below θ.
    """
    n = min(out_dim, in_dim)
    ratio = n / max(out_dim, in_dim)
    steps = [math.pi * (i + 0.5) / STEPS for i in range(STEPS)]
    # The density of eigenvalues, as a share of all, over equal steps of θ.
    shares = [
        2 * math.sin(t) ** 2 / (STEPS * max(1 + ratio - 2 * ratio**0.5 * math.cos(t), 1e-12)) for t in steps
    ]
    below = sum(
        share
        for t, share in zip(steps, shares, strict=True)
        if (t - math.sin(t) * math.cos(t)) / math.pi < 1 - energy
    )
    return max(1, math.ceil(n * (1 - below)))
