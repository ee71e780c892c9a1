"""Which feature directions a task adds, from a bounded number of numbers: a streaming Nystrom sketch.

The second moment of a layer's inputs takes in^2 numbers. Here only its product with s test vectors is kept, which is
linear in it, so batches and processes add up. The energies that the rule needs are kept exactly, so that what the
sketch can't see is known to the last digit, not estimated.

Shapes: x (..., in), C = X^T X (in, in), basis U (in, k), P = I - U U^T, residual moment C_hat = P C P,
test vectors T (in, s) orthonormal and outside U, image C T (in, s), s = sketch size, m = new directions.

Source: Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from streaming
data" (NeurIPS 2017). The Nystrom approximation N = C_hat T (T^T C_hat T)^+ T^T C_hat satisfies 0 <= N <= C_hat, so
its eigenvalues, and the energy it says its eigenvectors hold, are never above the truth; and
E trace(C_hat - N) <= (1 + p / (s - p - 1)) times the sum of C_hat's eigenvalues beyond the p-th, for every p < s - 1
(theorem 4.1; Halko, Martinsson and Tropp 2011, theorem 10.5).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llava_keeplora.subspace.basis import check_basis, check_finite, orthonormal_beside, residual
from llava_keeplora.subspace.energy import check_energy, energy_rank
from llava_keeplora.subspace.errors import ShapeError
from llava_keeplora.subspace.features import FeatureDirections
from llava_keeplora.subspace.moments import SecondMoment, counted_rows

# Eigenvalues of T^T C T below this share of the largest are rounding of the float32 products.
NOISE = 16 * torch.finfo(torch.float32).eps
# Rounding of the energies, as a share of the whole.
ROUNDING = 1e-6
# Bytes per input of one sketched direction: the image in float64, the test vector in float32.
BYTES = 12
# Fewer directions than this aren't worth a pass over the data.
SMALLEST = 16


@dataclass(frozen=True)
class SketchedFeatureDirections(FeatureDirections):
    """What a task's features add to a layer's basis, by a sketch: `energy_after` is a lower bound.

    Args:
        missed: share of the features' energy that the sketch can't place, trace(C_hat - N) / ||X||^2.
        fewest: the exact second moment would have given between `fewest` and `rank` directions.
        reached: whether the energy asked for is reached; where not, `rank` is all that the sketch has, and a second
            pass with `refined` or a larger sketch is needed.
    """

    missed: float
    fewest: int
    reached: bool


class SketchedMoment:
    """Streaming sketch of the residual second moment, of 12 in s bytes; `SecondMoment` where that doesn't fit.

    Args:
        dim: the layer's input width.
        size: s; at most in - k are kept, which is exact.
        basis: U, (in, k), the protected subspace whose complement is sketched; nothing is protected when absent.
        seed: of the test vectors; the same in every process.
        device: of the buffers.
        test: test vectors of one's own, (in, s), instead of random ones.
    """

    def __init__(
        self,
        dim: int,
        size: int,
        basis: Tensor | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        test: Tensor | None = None,
    ):
        self.dim = dim
        self.basis = (torch.zeros(dim, 0) if basis is None else basis.detach().float()).to(device)
        check_basis(self.basis, dim, "a feature sketch")
        size = min(size, dim - self.basis.shape[1])
        if test is None:
            test = torch.randn(max(size, 0), dim, generator=torch.Generator().manual_seed(seed)).T
        # N depends on the span of T alone; orthonormal columns keep the small problem as well conditioned as C is.
        outside = residual(test.to(device, torch.float64).T, self.basis).T
        columns = torch.linalg.qr(outside).Q
        # Where there are fewer dimensions to span, QR fills up with columns of its own, which may lie anywhere.
        self.test = residual(columns.T, self.basis).T.float().contiguous()
        self.image = torch.zeros(dim, self.test.shape[1], dtype=torch.float64, device=device)
        # Energy of the features, and of their part inside the basis.
        self.energies = torch.zeros(2, dtype=torch.float64, device=device)
        self.count = 0

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers: sum them over processes, in place, before asking for directions."""
        return [self.image, self.energies]

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
        self.image += rows.T @ (rows @ self.test)
        self.energies[0] += rows.norm(dtype=torch.float64) ** 2
        self.energies[1] += (rows @ self.basis).norm(dtype=torch.float64) ** 2

    def merge(self, other: "SketchedMoment") -> None:
        """Add another stream's sums and count, as from another process.

        Raises:
            ShapeError: if the sketches don't share their test vectors.
        """
        if other.test.shape != self.test.shape or not torch.allclose(other.test.to(self.test), self.test, atol=1e-5):
            raise ShapeError("feature sketches with other test vectors (width, size, basis or seed) can't be merged")
        self.count += other.count
        for buffer, addend in zip(self.tensors, other.tensors):
            buffer.add_(addend.to(buffer.device))

    def refined(self) -> "SketchedMoment":
        """An empty sketch for a second pass over the same data, with the span of the first one's image as test vectors.

        One step of subspace iteration: what the first pass missed shrinks by the ratio of the missed eigenvalues to
        the wanted ones, squared. This sketch must be complete and summed.
        """
        return SketchedMoment(self.dim, self.test.shape[1], self.basis, device=self.image.device, test=self.image)

    def directions(self, basis: Float[Tensor, "in k"], energy: float) -> SketchedFeatureDirections:
        """Fewest sketched directions that are sure to hold the energy of the features together with the basis.

        Source: KeepLoRA (arXiv 2601.19659), the feature step at epsilon_f; Gradient Projection Memory (Saha et al.,
        ICLR 2021, equation 9), with lower bounds of the energies.

        Args:
            basis: U, (in, k), the one that the sketch was made for.
            energy: epsilon_f, in (0, 1].

        Raises:
            EnergyError: if the energy is outside (0, 1].
            ShapeError: if the basis isn't the sketch's.
            NonFiniteError: if the features held NaN or infinity.
        """
        check_energy(energy)
        if basis.shape != self.basis.shape or not torch.equal(basis.detach().to(self.basis), self.basis):
            raise ShapeError("a feature sketch only answers for the basis that it was made for")
        check_finite(self.image, "second moment of the features")
        check_finite(self.energies, "energy of the features")
        total, inside = self.energies.tolist()
        if total <= 0.0 or energy_rank(torch.ones(1), energy, total=total, captured=inside) == 0:
            share = inside / total if total > 0.0 else 1.0
            return SketchedFeatureDirections(basis.new_zeros(self.dim, 0, dtype=torch.float32), share, share, 0, 0.0, 0, True)
        squared, directions = self._nystrom()
        missed = max(0.0, total - inside - float(squared.sum()))
        rank = energy_rank(squared, energy, total=total, captured=inside)
        rank = min(rank, int((squared > 0.0).sum()))
        held = inside + float(squared[:rank].sum())
        return SketchedFeatureDirections(
            new=orthonormal_beside(basis, directions[:, :rank]).float().contiguous(),
            energy_before=inside / total,
            energy_after=min(1.0, held / total),
            rank=rank,
            missed=missed / total,
            fewest=min(rank, energy_rank(squared, energy, total=total, captured=inside + missed)),
            reached=held >= (energy - ROUNDING) * total,
        )

    def _nystrom(self) -> tuple[Float[Tensor, " s"], Float[Tensor, "in s"]]:
        """Eigenvalues (descending) and eigenvectors of N, in float64."""
        test, image = self.test.double(), residual(self.image.T, self.basis).T
        small = test.T @ image
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        certain = values > NOISE * values[-1:].clamp_min(0.0).sum()
        # N = F F^T. What is left out here as rounding only lowers N.
        factor = image @ (vectors[:, certain] * values[certain].rsqrt())
        left, singular, _ = torch.linalg.svd(factor, full_matrices=False)
        return singular.square(), left


def choose_statistic(
    dim: int, budget_bytes: int, basis: Tensor | None = None, *, seed: int = 0, device: torch.device | str = "cpu"
) -> SecondMoment | SketchedMoment:
    """The most exact statistic of a layer's features that fits the memory: float64, float32, or sketched.

    Args:
        dim: the layer's input width.
        budget_bytes: for this one statistic.
        basis: U, (in, k), for the sketch.
        seed: of the sketch.
        device: of the buffers.

    Raises:
        ShapeError: if not even a sketch of `SMALLEST` directions fits.
    """
    for dtype in (torch.float64, torch.float32):
        if dtype.itemsize * dim**2 <= budget_bytes:
            return SecondMoment(dim, dtype, device)
    size = budget_bytes // (BYTES * dim)
    if size < SMALLEST:
        raise ShapeError(
            f"{budget_bytes} bytes hold {size} sketched directions of features of width {dim}, but at least {SMALLEST} "
            f"are needed, which take {SMALLEST * BYTES * dim} bytes"
        )
    return SketchedMoment(dim, size, basis, seed=seed, device=device)
