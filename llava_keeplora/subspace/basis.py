"""Operations on bases: tall matrices with orthonormal columns.

Shapes: in = the layer's input width, k = protected directions (may be 0), m = new directions, `...` = any
leading dimensions. U is (in, k) with U^T U = I.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llava_keeplora.subspace.errors import NonFiniteError, RankError, ShapeError

# A new direction that has less than this fraction of its length outside the span of the others depends on
# them.
DEPENDENT = 1e-5
# Norm of a column of U^T U - I beyond which a basis has drifted: more than rounding in float32 explains.
DRIFT = 1e-5
# Largest entry of |U^T U - I| with which columns can still be orthonormalised as a drifted basis.
BROKEN = 1e-2


def empty_basis(
    dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Float[Tensor, "in 0"]:
    """Return the basis that protects nothing, of shape (dim, 0).

    Args:
        dim: the layer's input width.
        dtype: dtype of the result.
        device: device of the result.
    """
    return torch.zeros(dim, 0, dtype=dtype, device=device)


def check_basis(basis: Tensor, dim: int, what: str) -> None:
    """Check that a basis consists of at most dim columns in R^dim.

    Args:
        basis: (in, k).
        dim: the layer's input width.
        what: what the basis is used with, for the message.

    Raises:
        ShapeError: if it does not.
    """
    if basis.ndim != 2 or basis.shape[0] != dim or basis.shape[1] > dim:
        raise ShapeError(
            f"a basis for {what} of input width {dim} must have shape ({dim}, k) with k <= {dim}, "
            f"but it is {tuple(basis.shape)}"
        )


def check_finite(tensor: Tensor, what: str) -> None:
    """Check that a tensor holds neither NaN nor infinity.

    Args:
        tensor: the tensor.
        what: what it is, for the message.

    Raises:
        NonFiniteError: if it holds either.
    """
    # Minimum and maximum, which are NaN if any entry is, take a single read of the tensor.
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise NonFiniteError(f"the {what} holds NaN or infinity, so it has no meaningful singular vectors")


def like(basis: Float[Tensor, "in k"], other: Tensor) -> Float[Tensor, "in k"]:
    """Return a basis on another tensor's device and in its dtype.

    Args:
        basis: U, (in, k), often on the host, in float32.
        other: the tensor that it is used with.
    """
    # In two steps: one step for both would convert on the host and move twice the bytes.
    return basis.to(other.device).to(other.dtype)


def project(v: Float[Tensor, "... in"], basis: Float[Tensor, "in k"]) -> Float[Tensor, "... in"]:
    """Return the part of v inside the span: U U^T v, over the last dimension.

    Source: KeepLoRA (arXiv 2601.19659), the projection onto the principal subspace M'.

    Args:
        v: (..., in).
        basis: U, (in, k), orthonormal columns; k may be 0.

    Raises:
        ShapeError: if the last dimension of v isn't the basis's height.
    """
    check_basis(basis, v.shape[-1], "a tensor")
    basis = like(basis, v)
    return (v @ basis) @ basis.T


def residual(v: Float[Tensor, "... in"], basis: Float[Tensor, "in k"]) -> Float[Tensor, "... in"]:
    """Return the part of v outside the span: v - U U^T v, over the last dimension.

    Source: KeepLoRA (arXiv 2601.19659), the residual gradient G (I - M' M'^T).

    Args:
        v: (..., in).
        basis: U, (in, k), orthonormal columns; k may be 0.

    Raises:
        ShapeError: if the last dimension of v isn't the basis's height.
    """
    return v - project(v, basis)


def orthonormality_error(basis: Float[Tensor, "in k"]) -> float:
    """Return the largest entry of |U^T U - I|, computed in float64; 0 for an empty basis.

    Args:
        basis: U, (in, k).
    """
    if basis.shape[1] == 0:
        return 0.0
    tall = basis.detach().double()
    gram = tall.T @ tall
    gram.diagonal().sub_(1.0)
    return float(gram.abs().max())


def orthonormalized(basis: Float[Tensor, "in k"]) -> Float[Tensor, "in k"]:
    """Return the nearest orthonormal columns to columns that have drifted, in the basis's dtype.

    This is the polar factor U (U^T U)^(-1/2), which has the same span.

    Source: Higham, "Functions of Matrices" (2008), theorem 8.4.

    Args:
        basis: (in, k), orthonormal up to `BROKEN`.

    Raises:
        ShapeError: if the columns are further from orthonormal than that.
    """
    error = orthonormality_error(basis)
    if not error <= BROKEN:
        raise ShapeError(
            f"a basis of shape {tuple(basis.shape)} isn't orthonormal: |U^T U - I| reaches {error:.1e}; was "
            "it stored in low precision or scaled?"
        )
    left, _, right = torch.linalg.svd(basis.detach().double(), full_matrices=False)
    return (left @ right).to(basis.dtype)


def has_drifted(basis: Float[Tensor, "in k"]) -> bool:
    """Return whether the columns are further from orthonormal than rounding in float32 explains.

    This is estimated from random linear combinations of the columns.

    Args:
        basis: U, (in, k).
    """
    tall = basis.detach().double()
    probe = torch.randn(tall.shape[1], 8, generator=torch.Generator().manual_seed(0)).to(tall)
    # A Gaussian g has E |M g|^2 = |M|_F^2; U^T U itself would cost as much as the rest of
    # `append_directions`.
    error = (tall.T @ (tall @ probe) - probe).norm() / max(1, probe.numel()) ** 0.5
    return not float(error) <= DRIFT


def append_directions(
    basis: Float[Tensor, "in k"], new: Float[Tensor, "in m"]
) -> Float[Tensor, "in k_plus_m"]:
    """Append new directions; the old columns stay bitwise the same unless they have drifted.

    Appending cannot make stored columns drift, but a cast to half precision elsewhere can: a basis beyond
    `DRIFT` is orthonormalised first. The new columns are projected onto the complement of the old ones twice
    (once leaves rounding behind) and orthonormalised among themselves in float64, keeping their signs.

    Source: KeepLoRA (arXiv 2601.19659), the update M' <- [M', new].

    Args:
        basis: (in, k), orthonormal columns.
        new: (in, m), linearly independent columns, none of them inside the span of the basis.

    Returns:
        (in, k + m), in the basis's dtype.

    Raises:
        ShapeError: if the heights differ, or if the basis is far from orthonormal.
        NonFiniteError: if `new` holds NaN or infinity.
        RankError: if k + m exceeds `in`, or if a new column depends on the others.
    """
    dim, old = basis.shape
    check_basis(basis, new.shape[0], "new directions")
    count = new.shape[1]
    if old + count > dim:
        raise RankError(
            f"{count} new directions don't fit into a space of dimension {dim} next to {old} protected ones",
            requested=count,
            available=dim - old,
        )
    if count == 0:
        return basis
    check_finite(new, "block of new directions")
    if has_drifted(basis):
        basis = orthonormalized(basis)
    return torch.cat([basis, orthonormalize_against(basis, new).to(basis.dtype)], dim=1)


def orthonormalize_against(basis: Float[Tensor, "in k"], new: Float[Tensor, "in m"]) -> Float[Tensor, "in m"]:
    """Return orthonormal columns (in, m), float64, that span together with the basis what `new` adds to it.

    Args:
        basis: (in, k), orthonormal columns.
        new: (in, m), linearly independent of each other and of the basis.

    Raises:
        RankError: if a column of `new` lies in the span of the basis and the columns before it.
    """
    tall, columns = basis.detach().double(), new.detach().double()
    lengths = columns.norm(dim=0)
    for _ in range(2):
        columns = columns - tall @ (tall.T @ columns)
    q, r = torch.linalg.qr(columns)
    lengths_left = r.diagonal().abs()
    available = int((lengths_left > DEPENDENT * lengths).sum())
    if available < new.shape[1]:
        raise RankError(
            f"only {available} of {new.shape[1]} new directions are independent of the {basis.shape[1]} "
            "columns of the basis and of each other",
            requested=new.shape[1],
            available=available,
        )
    # Householder QR may flip signs; the directions keep theirs.
    q = q * r.diagonal().sign()
    # Normalising a column that was nearly inside the span magnifies its rounding; one more projection removes
    # it.
    return q - tall @ (tall.T @ q)


def overlap(first: Float[Tensor, "in k1"], second: Float[Tensor, "in k2"]) -> float:
    """Return the overlap of two subspaces, ||U^T V||_F^2 / min(k1, k2).

    It is 0 for orthogonal subspaces, and 1 if one lies inside the other.

    Source: KeepLoRA (arXiv 2601.19659), the assumption that tasks use orthogonal feature directions; the
    measure is that of LoRA (Hu et al., 2021, section 7.2).

    Args:
        first: U, (in, k1).
        second: V, (in, k2).

    Returns:
        a number in [0, 1]; 0 if either basis is empty.

    Raises:
        ShapeError: if the heights differ.
    """
    check_basis(second, first.shape[0], "another basis")
    smaller = min(first.shape[1], second.shape[1])
    if smaller == 0:
        return 0.0
    return float((first.detach().double().T @ second.detach().double()).square().sum() / smaller)
