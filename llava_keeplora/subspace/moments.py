"""Streaming second moments of a layer's inputs: X^T X without storing X.

Shapes: x (..., in), C = X^T X (in, in), in = the layer's input width.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llava_keeplora.subspace.errors import ShapeError
from llava_keeplora.subspace.features import FeatureDirections, feature_directions


class SecondMoment:
    """C = sum of x x^T over all rows so far; the eigenvectors of C are the right singular vectors of X.

    Each call adds one float32 matrix product to a buffer of `dtype`. Float64 keeps the sums of thousands of
    batches accurate; it takes 8 * dim^2 bytes.

    Source: KeepLoRA (arXiv 2601.19659), the feature step; equivalent to the SVD of the stacked features.

    Args:
        dim: the layer's input width.
        dtype: dtype of the buffer, float64 or float32.
        device: device of the buffer; that of the first rows when None.
    """

    def __init__(
        self, dim: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ):
        self.dim = dim
        self.dtype = dtype
        self.count = 0
        self._sum = None if device is None else torch.zeros(dim, dim, dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, x: Float[Tensor, "... in"], mask: Bool[Tensor, "..."] | None = None) -> None:
        """Add rows.

        Args:
            x: (..., in), any floating dtype.
            mask: over the leading dimensions, True for the rows that count (padding is False).

        Raises:
            ShapeError: if the width or the mask doesn't fit.
        """
        rows = counted_rows(x, mask, self.dim)
        self.count += rows.shape[0]
        product = rows.T @ rows
        self._sum = product.to(self.dtype) if self._sum is None else self._sum.add_(product)

    @property
    def tensors(self) -> list[Tensor]:
        """The buffer, to be summed over processes in place; it exists even before the first row."""
        if self._sum is None:
            self._sum = torch.zeros(self.dim, self.dim, dtype=self.dtype)
        return [self._sum]

    def directions(
        self, basis: Float[Tensor, "in k"], energy: float, limit: int | None = None, least: float = 0.0
    ) -> FeatureDirections:
        """Return what the features add to a basis, which may be on any device; see `feature_directions`."""
        return feature_directions(self.matrix, basis.to(self.matrix.device), energy, limit, least)

    def held(self, basis: Float[Tensor, "in k"], new: Float[Tensor, "in m"]) -> float:
        """Return the fraction of the features' energy inside a basis and new directions; 1 without energy."""
        moment = self.matrix.double()
        columns = torch.cat([basis.to(moment), new.to(moment)], 1)
        total = float(moment.trace())
        return float((columns * (moment @ columns)).sum()) / total if total > 0.0 else 1.0

    def merge(self, other: "SecondMoment") -> None:
        """Add the sum and count of another stream, for instance of another process.

        Raises:
            ShapeError: if the widths differ.
        """
        if other.dim != self.dim:
            raise ShapeError(f"second moments of width {self.dim} and {other.dim} can't be merged")
        self.count += other.count
        if other._sum is not None:
            self._sum = (
                other._sum.to(self.dtype, copy=True)
                if self._sum is None
                else self._sum.add_(other._sum.to(self._sum))
            )

    @property
    def matrix(self) -> Float[Tensor, "in in"]:
        """C, (dim, dim), in the buffer's dtype; zeros before the first row."""
        return torch.zeros(self.dim, self.dim, dtype=self.dtype) if self._sum is None else self._sum


def counted_rows(
    x: Float[Tensor, "... in"], mask: Bool[Tensor, "..."] | None, dim: int
) -> Float[Tensor, "n in"]:
    """Return the rows of a batch that count, in float32.

    Args:
        x: (..., in), any floating dtype.
        mask: over the leading dimensions, True for the rows that count.
        dim: the layer's input width.

    Raises:
        ShapeError: if the width or the mask doesn't fit.
    """
    if x.shape[-1] != dim:
        raise ShapeError(f"second moments of width {dim} got features of shape {tuple(x.shape)}")
    if mask is not None:
        if mask.shape != x.shape[:-1]:
            raise ShapeError(
                f"a mask of shape {tuple(mask.shape)} doesn't fit features of shape {tuple(x.shape)}"
            )
        # Indexing copies the rows, which is unnecessary for most batches.
        x = x if bool(mask.all()) else x[mask]
    return x.reshape(-1, dim).float()
