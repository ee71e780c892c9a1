"""The directions of a task's adapter: the strongest ones of the gradient outside the protected subspace.

Shapes: gradient G (out, in), basis U (in, k), A (in, r) with PEFT's lora_A.weight = A^T, right V (out, r).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llava_keeplora.subspace.basis import check_basis, check_finite, like, residual
from llava_keeplora.subspace.errors import RankError, ShapeError
from llava_keeplora.subspace.truncated import gram_matrix

# Singular values below this fraction of the gradient's norm are rounding of float32 gradients and bases.
NOISE = 32 * torch.finfo(torch.float32).eps
# Subspace iteration is used if the matrix is this many times wider than the block, and stops at this sine of
# the angle to the exact space.
WORTH_TRUNCATING = 8
ANGLE = 1e-6
ROUNDS = 12


@dataclass(frozen=True)
class ResidualDirections:
    """The leading singular factors of the residual gradient, G_hat^T ~ A S V^T.

    Args:
        A: (in, r) float32, orthonormal, orthogonal to the basis.
        singular_values: (r,) float32, descending, none of them zero.
        right: V, (out, r) float32, orthonormal; the paper's B_0 is S V^T, (r, out).
        captured: fraction of the residual gradient's energy that the r directions hold.
        residual_energy: fraction of the gradient's energy outside the basis.
    """

    A: Tensor
    singular_values: Tensor
    right: Tensor
    captured: float
    residual_energy: float


@dataclass(frozen=True)
class HeldOut:
    """Directions of a gradient, and rows on which they are measured.

    Args:
        A: (in, r), orthonormal, outside the basis.
        rows: (l, in), a matrix with the energy of the residual gradient, exactly or on average.
    """

    A: Tensor
    rows: Tensor

    def energy(self, A: Float[Tensor, "in r"]) -> float:
        """Return the energy that directions hold of the residual gradient."""
        return float((self.rows @ A).square().sum())


class DenseGradient:
    """G = sum of dY^T X over batches in float32.

    The reference for `GradientSketch`, and smaller than it for small layers.

    Args:
        out_dim: out.
        in_dim: in.
        basis: U, (in, k), the protected subspace; empty when None.
        device: device of the buffer.
    """

    def __init__(
        self, out_dim: int, in_dim: int, basis: Tensor | None = None, *, device: torch.device | str = "cpu"
    ):
        self.basis = torch.zeros(in_dim, 0) if basis is None else basis.detach()
        self.matrix = torch.zeros(out_dim, in_dim, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        """The buffer, to be summed over processes in place before `directions` is called."""
        return [self.matrix]

    @torch.no_grad()
    def add(self, x: Float[Tensor, "... in"], dy: Float[Tensor, "... out"]) -> None:
        """Add a batch's dY^T X.

        Args:
            x: the layer's input, (..., in), any floating dtype.
            dy: gradient of the loss with respect to its output, (..., out).

        Raises:
            ShapeError: if they don't fit the layer or each other.
        """
        x2, dy2 = flatten_rows(x, dy, self.matrix.shape[1], self.matrix.shape[0])
        self.matrix.addmm_(dy2.T, x2)

    #: Whether `directions` may fall short, so that further passes over the data are needed.
    further_passes = False

    def held_out(self, rank: int) -> HeldOut:
        """Return the top r directions, and the residual gradient, on which others can be measured."""
        check_finite(self.matrix, "gradient")
        rows = residual(self.matrix.double(), like(self.basis, self.matrix.double()))
        return HeldOut(torch.linalg.svd(rows, full_matrices=False).Vh[:rank].T, rows)

    def directions(self, rank: int, *, allow_fewer: bool = False) -> ResidualDirections:
        """Return the top r directions of the residual gradient; see `residual_gradient_directions`."""
        return residual_gradient_directions(
            self.matrix, self.basis.to(self.matrix.device), rank, allow_fewer=allow_fewer
        )


def flatten_rows(
    x: Float[Tensor, "... in"], dy: Float[Tensor, "... out"], in_dim: int, out_dim: int
) -> tuple[Float[Tensor, "n in"], Float[Tensor, "n out"]]:
    """Return a batch's inputs and output gradients as rows, in float32.

    Raises:
        ShapeError: if they don't fit the layer or each other.
    """
    if x.shape[-1] != in_dim or dy.shape[-1] != out_dim or x.shape[:-1] != dy.shape[:-1]:
        raise ShapeError(
            f"a gradient of a layer ({out_dim}, {in_dim}) needs inputs (..., {in_dim}) and output gradients "
            f"(..., {out_dim}) of the same rows, but got {tuple(x.shape)} and {tuple(dy.shape)}"
        )
    return x.reshape(-1, in_dim).float(), dy.reshape(-1, out_dim).float()


def residual_gradient_directions(
    gradient: Float[Tensor, "out in"], basis: Float[Tensor, "in k"], rank: int, *, allow_fewer: bool = False
) -> ResidualDirections:
    """Return the top r singular directions of the gradient outside the basis.

    Source: KeepLoRA (arXiv 2601.19659), the residual gradient and the initialisation of A and B_0.

    Args:
        gradient: G, (out, in), the mean gradient of the loss with respect to the weight.
        basis: U, (in, k), orthonormal columns; k may be 0.
        rank: r, at least 1.
        allow_fewer: whether fewer than r directions (but at least one) are returned if there are no more. A
            gradient's rank is bounded by the number of its rows, such as the classes of a small task in the
            last text block.

    Raises:
        ShapeError: if the gradient isn't a matrix or the basis doesn't fit it.
        NonFiniteError: if the gradient holds NaN or infinity.
        RankError: if r is below 1 or above min(out, in - k), or if the residual gradient has fewer than r
            singular values above rounding; `available` is their number.
    """
    if gradient.ndim != 2:
        raise ShapeError(f"a gradient must be a matrix (out, in), but it has shape {tuple(gradient.shape)}")
    out_dim, in_dim = gradient.shape
    check_basis(basis, in_dim, "a gradient")
    check_finite(gradient, "gradient")
    most = max_directions(rank, out_dim, in_dim, basis.shape[1], allow_fewer)
    exact = gradient.detach().double()
    outside = residual(exact, basis)
    norm, energy = float(exact.norm()), float(outside.square().sum())
    left, singular, right = _leading_triplets(outside, min(rank, most))
    count = above_rounding(singular, norm, rank, most, allow_fewer)
    left, singular, right = left[:, :count], singular[:count], right[:, :count]
    return ResidualDirections(
        A=reorthogonalize(left, basis).float().contiguous(),
        singular_values=singular.float(),
        right=right.float().contiguous(),
        captured=min(1.0, float(singular.square().sum()) / energy),
        residual_energy=energy / norm**2,
    )


def _leading_triplets(outside: Float[Tensor, "out in"], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (input-side vectors, singular values, output-side vectors) of the r strongest directions.

    All are in float64.
    """
    out_dim, in_dim = outside.shape
    small = outside if out_dim <= in_dim else outside.T
    near = _iterated(small, rank)
    if near is None:
        _, vectors = torch.linalg.eigh(gram_matrix(small.T))
        near = vectors[:, -rank:].flip(1)
    far = small.T @ near
    # The norms of the mapped vectors are the singular values, without the error of squaring in a Gram matrix.
    singular = far.norm(dim=0)
    far = far / singular.clamp_min(torch.finfo(far.dtype).tiny)
    return (far, singular, near) if out_dim <= in_dim else (near, singular, far)


def _iterated(matrix: Float[Tensor, "n wide"], rank: int) -> Tensor | None:
    """Return the left singular vectors (n, r) by subspace iteration; None if it is slow or does not converge.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness" (SIAM Review 2011), algorithm
    4.4; the angle to the exact space is bounded by residual over gap (Davis and Kahan, 1970).
    """
    n, width = matrix.shape[0], 2 * rank + 16
    if n < WORTH_TRUNCATING * width:
        return None
    # A fixed seed makes the result the same in every process.
    generator = torch.Generator(device=matrix.device).manual_seed(0)
    block = torch.randn(n, width, generator=generator, dtype=matrix.dtype, device=matrix.device)
    for _ in range(ROUNDS):
        block = torch.linalg.qr(block).Q
        image = matrix @ (matrix.T @ block)
        small = block.T @ image
        values, rotation = torch.linalg.eigh((small + small.T) / 2)
        values, rotation = values.flip(0)[: rank + 1], rotation.flip(1)[:, :rank]
        vectors = block @ rotation
        residuals = (image @ rotation - vectors * values[:rank]).norm(dim=0)
        gap = float(values[rank - 1] - values[rank])
        if gap > 0.0 and float(residuals.norm()) <= ANGLE * gap:
            return vectors
        block = image
    return None


def reorthogonalize(left: Float[Tensor, "in r"], basis: Float[Tensor, "in k"]) -> Float[Tensor, "in r"]:
    """Remove from A the rounding inside the basis, and orthonormalise it again; columns keep their signs."""
    q, r = torch.linalg.qr(residual(residual(left.T, basis), basis).T)
    return q * r.diagonal().sign()


def max_directions(rank: int, out_dim: int, in_dim: int, protected: int, allow_fewer: bool) -> int:
    """Return the most directions that a residual gradient can have.

    Raises:
        RankError: if the rank is below 1, or above that number unless fewer are allowed.
    """
    most = min(out_dim, in_dim - protected)
    if rank < 1 or (rank > most and not allow_fewer):
        raise RankError(
            f"rank {rank} must lie between 1 and the residual dimension: the layer's input width is "
            f"{in_dim}, {protected} directions are protected, {in_dim - protected} are left, and its output "
            f"width is {out_dim}",
            requested=rank,
            available=most,
        )
    return most


def above_rounding(
    singular: Float[Tensor, " r"], norm: float, rank: int, most: int, allow_fewer: bool
) -> int:
    """Return how many leading singular values are above the gradient's rounding.

    Raises:
        RankError: if there are none, or fewer than the rank unless fewer are allowed.
    """
    count = int((singular > NOISE * norm).sum())
    if count < rank and not (allow_fewer and count):
        raise RankError(
            f"the gradient outside the protected subspace has only {count} direction(s) above rounding, "
            f"fewer than the rank {rank} (residual dimension {most})",
            requested=rank,
            available=count,
        )
    return count
