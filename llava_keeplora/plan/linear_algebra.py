"""Working memory of the subspaces' computations for one layer, in bytes, without their inputs.

Their control flow depends on values (how many directions reach an energy), so they can't be rehearsed on fake
tensors. Each function adds up the tensors that are alive at the most expensive moment of the code that it
names, on its most expensive path.

Legend: in / out features of a layer, n = min(in, out), k columns of a basis, r rank, w sketch width.
"""

from __future__ import annotations

import math
from functools import cache

from llava_keeplora.subspace import GradientSketch

F32, F64 = 4, 8
#: Workspace of LAPACK's and cuSOLVER's divide-and-conquer eigensolvers, in sizes of the matrix; the
#: eigenvectors come on top.
EIGENSOLVER = 2
#: Assumed share of a layer's input width that a task adds to its basis; the true one depends on the tasks.
GROWTH = 0.02
#: Points of the numerical integration in `random_rank`.
STEPS = 2000


def weight_basis(out_dim: int, in_dim: int, columns: int, size: int) -> int:
    """Return the bytes that `subspace/principal.py` takes.

    These are the weight in fp32 (twice while it is scaled), its Gram matrix, the eigenvectors and the
    eigensolver's workspace, or six Ritz blocks of up to a third of that size; for a wide weight also the
    vectors mapped to the input side and their QR.

    Args:
        out_dim, in_dim: out, in.
        columns: k.
        size: bytes of one number of the weight.
    """
    n, weight = min(out_dim, in_dim), out_dim * in_dim
    scaling = F32 * weight * (1 if size == F32 else 2)
    solving = F32 * (weight + (2 + EIGENSOLVER) * n * n)
    mapping = F32 * (weight + 3 * n * n + 3 * in_dim * columns) if out_dim < in_dim else 0
    return max(scaling, solving, mapping)


def feature_directions(in_dim: int, columns: int, exact: bool) -> int:
    """Return the bytes that `subspace/features.py` takes for an exact second moment.

    These are the residual moment and one more matrix of its size while it is formed; then the complement of
    the basis, its image, the small problem, its eigenvectors and the workspace, in fp64.

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
    """Return the bytes that `subspace/feature_sketch.py` takes.

    These are six matrices of (in, size) in fp64: the test vectors, their residual image, the factor, its
    singular vectors (two), and their copy in the result.
    """
    return F64 * 6 * in_dim * size


def gradient_directions(out_dim: int, in_dim: int, width: int | None) -> int:
    """Return the bytes that `subspace/gradients.py` or `subspace/gradient_sketch.py` takes, in fp64.

    For the whole gradient these are the gradient, its residual and one more matrix while that is formed, or
    the Gram matrix with its eigenvectors and the workspace. For a sketch they are the rows and their
    residual, Psi, the range and its QR, the factor, the misses and the singular vectors.

    Args:
        out_dim, in_dim: out, in.
        width: w; None for a method that needs the whole gradient. Where a sketch would be no smaller, the
            whole gradient is used as well.
    """
    n = min(out_dim, in_dim)
    if width is None or not GradientSketch.is_worth_it(out_dim, in_dim, width):
        return F64 * max(3 * out_dim * in_dim, 2 * out_dim * in_dim + (2 + EIGENSOLVER) * n * n)
    rows = 2 * min(width, n) + 1
    return F64 * (rows * (4 * in_dim + out_dim) + 3 * min(width, n) * out_dim)


@cache
def random_rank(out_dim: int, in_dim: int, energy: float) -> int:
    """Return how many singular vectors of a random matrix hold a share `energy` of its energy.

    This bounds a trained weight, whose spectrum is no flatter.

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
