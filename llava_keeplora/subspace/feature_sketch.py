"""The feature directions that a task adds, in bounded memory: a streaming Nystrom sketch.

The second moment of a layer's inputs takes in^2 numbers. Here only its product with s test vectors is stored,
which is linear in it, so that batches and processes can be summed. The features' total energy is exact. The
basis, which would take as much device memory as the second moment, stays on the host: the energy inside it is
computed at the end from evenly spaced rows, exactly if there are at most `SAMPLE` rows, and with a standard
error if there are more.

Shapes: x (..., in), C = X^T X (in, in), basis U (in, k), P = I - U U^T, residual moment C_hat = P C P,
test vectors T (in, s) orthonormal and outside U, image C T (in, s), s = sketch size, m = new directions.

Source: Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from
streaming data" (NeurIPS 2017). The Nystrom approximation N = C_hat T (T^T C_hat T)^+ T^T C_hat satisfies 0 <=
N <= C_hat, so its eigenvalues, and the energy that it attributes to its eigenvectors, are lower bounds; and
E trace(C_hat - N) <= (1 + p / (s - p - 1)) times the sum of C_hat's eigenvalues beyond the p-th, for every p
< s - 1 (theorem 4.1; Halko, Martinsson and Tropp 2011, theorem 10.5).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llava_keeplora.subspace.basis import check_basis, check_finite, like, orthonormalize_against, residual
from llava_keeplora.subspace.energy import check_energy, energy_rank
from llava_keeplora.subspace.errors import ShapeError
from llava_keeplora.subspace.features import FeatureDirections, above, limited
from llava_keeplora.subspace.moments import counted_rows

# Eigenvalues of T^T C T below this fraction of the largest are rounding of the float32 products.
NOISE = 16 * torch.finfo(torch.float32).eps
# Rounding of the energies, as a fraction of the total.
ROUNDING = 1e-6
# Bytes per input and sketched direction: the image in float64, the test vector in float32.
BYTES = 12
# Least number of directions of a sketch; fewer are not worth a pass over the data.
SMALLEST = 16
# Least number of rows from which the energy inside the basis is estimated; up to twice as many are held.
SAMPLE = 512


@dataclass(frozen=True)
class SketchedFeatureDirections(FeatureDirections):
    """The directions that a task's features add to a layer's basis, from a sketch.

    If `energy_before` was computed from all rows, `energy_after` is a lower bound. If rows were sampled, both
    have the standard error `energy_error`, and `fewest` and `reached` are based on the estimate.

    Args:
        missed: fraction of the features' energy that the sketch can't place, trace(C_hat - N) / ||X||^2.
        energy_error: standard error of `energy_before`, and thus of `energy_after`; 0 if no rows were left
            out.
        fewest: the exact second moment would have given between `fewest` and `rank` directions.
        reached: whether the requested energy, or the limit, is reached, or no other direction can exceed the
            least energy of one; if not, `rank` is all that the sketch is certain of, and a second pass with
            `refined` or a larger sketch is needed.
    """

    missed: float
    energy_error: float
    fewest: int
    reached: bool


class _RowSample:
    """Evenly spaced rows of a stream, on the host: all while there are few, then every second, fourth, ..."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.seen, self.stride = 0, 1

    def add(self, rows: Float[Tensor, "n in"], dtype: torch.dtype) -> None:
        """Sample float32 rows, and store them in `dtype`, the precision that they had before."""
        # Thinned on the device before the transfer; copied, so that a row does not keep its batch in memory.
        while -(-(self.seen + len(rows)) // self.stride) > 2 * SAMPLE:
            self.rows = [torch.cat(self.rows)[::2].clone()] if self.rows else []
            self.stride *= 2
        if len(sampled := rows[-self.seen % self.stride :: self.stride]):
            self.rows.append(sampled.to("cpu", dtype, copy=True))
        self.seen += len(rows)

    def take(self) -> Float[Tensor, "n in"]:
        """Return the rows, of which there must be at least one, and start over without them."""
        rows = torch.cat(self.rows)
        self.__init__()
        return rows


class SketchedMoment:
    """Streaming sketch of the residual second moment in 12 in s bytes, if a `SecondMoment` doesn't fit.

    Args:
        dim: the layer's input width.
        size: s; reduced to in - k if larger, which is exact.
        basis: U, (in, k), the protected subspace whose complement is sketched; empty when None.
        seed: seed of the test vectors, the same in every process.
        device: device of the buffers.
        test: test vectors (in, s) to use instead of random ones.
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
        self.basis = torch.zeros(dim, 0) if basis is None else basis.detach().float()
        check_basis(self.basis, dim, "a feature sketch")
        size = min(size, dim - self.basis.shape[1])
        if test is None:
            test = torch.randn(max(size, 0), dim, generator=torch.Generator().manual_seed(seed)).T
        # N depends only on the span of T; orthonormal columns keep the small problem as well conditioned as
        # C.
        test = test.to(device).double()
        outside_of = like(self.basis, test)
        columns = torch.linalg.qr(residual(test.T, outside_of).T).Q
        # If the residual has fewer dimensions, QR fills up with arbitrary columns: project them once more.
        self.test = residual(columns.T, outside_of).T.float().contiguous()
        self.image = torch.zeros(dim, self.test.shape[1], dtype=torch.float64, device=device)
        # The number of rows and their energy.
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        self._sample = _RowSample()
        # Over the sampled rows with energies t, of which i is inside the basis: their number, and the sums of
        # t, i, t^2, t i and i^2.
        self._sample_sums = torch.zeros(6, dtype=torch.float64, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers, to be summed over processes in place before `directions` is called."""
        self._sum_sample()
        return [self.image, self.totals, self._sample_sums]

    def _sum_sample(self) -> None:
        if not self._sample.rows:
            return
        rows = self._sample.take().to(self.image.device).float()
        inside = (rows @ like(self.basis, rows)).double().square().sum(1)
        total = rows.double().square().sum(1)
        self._sample_sums += torch.stack(
            [
                total.new_tensor(len(rows)),
                *(v.sum() for v in (total, inside, total**2, total * inside, inside**2)),
            ]
        )

    @property
    def sampled_bytes(self) -> int:
        """Bytes of the rows that are held on the host now."""
        return sum(rows.nbytes for rows in self._sample.rows)

    def most_sampled_bytes(self, itemsize: int) -> int:
        """Return the most bytes that sampled rows take on the host.

        Args:
            itemsize: bytes per number of the features.
        """
        return 2 * SAMPLE * self.dim * itemsize

    @property
    def count(self) -> int:
        """Number of rows added."""
        return int(self.totals[0])

    @property
    def inside(self) -> tuple[float, float]:
        """Fraction of the features' energy inside the basis, and its standard error; (1, 0) without energy.

        A ratio estimate over evenly spaced rows (Cochran, "Sampling Techniques", 1977, section 6.4), with the
        correction for a finite population.
        """
        self._sum_sample()
        n, total, inside, tt, ti, ii = self._sample_sums.tolist()
        if total <= 0.0:
            return 1.0, 0.0
        fraction = inside / total
        variance = max(0.0, ii - 2 * fraction * ti + fraction**2 * tt) * max(0.0, 1.0 - n / self.count)
        return fraction, variance**0.5 / total

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
        self.image += rows.T @ (rows @ self.test)
        self.totals[0] += rows.shape[0]
        # Norms in float32 and their squares in float64 are accurate to 1e-8, in a quarter of the time that
        # converting every number takes.
        self.totals[1] += torch.linalg.vector_norm(rows, dim=1).double().square().sum()
        self._sample.add(rows, x.dtype)

    def merge(self, other: "SketchedMoment") -> None:
        """Add the sums and count of another stream, for instance of another process.

        Raises:
            ShapeError: if the sketches don't share their test vectors.
        """
        if other.test.shape != self.test.shape or not torch.allclose(
            other.test.to(self.test), self.test, atol=1e-5
        ):
            raise ShapeError(
                "feature sketches with other test vectors (width, size, basis or seed) can't be merged"
            )
        for buffer, addend in zip(self.tensors, other.tensors):
            buffer.add_(addend.to(buffer.device))

    def refined(self) -> "SketchedMoment":
        """Return an empty sketch for a second pass over the same data, whose test vectors span this image.

        This is one step of subspace iteration: what the first pass missed shrinks by the squared ratio of the
        missed eigenvalues to the wanted ones. This sketch must be complete and summed over processes.
        """
        return SketchedMoment(
            self.dim, self.test.shape[1], self.basis, device=self.image.device, test=self.image
        )

    def directions(
        self, basis: Float[Tensor, "in k"], energy: float, limit: int | None = None, least: float = 0.0
    ) -> SketchedFeatureDirections:
        """Return the fewest sketched directions that certainly reach the energy together with the basis.

        Source: KeepLoRA (arXiv 2601.19659), the feature step at epsilon_f; Gradient Projection Memory (Saha
        et al., ICLR 2021, equation 9), with lower bounds of the energies.

        Args:
            basis: U, (in, k), the basis of the sketch, on any device.
            energy: epsilon_f, in (0, 1].
            limit: the most directions, of which the strongest are taken; no limit when None.
            least: fraction of the energy of all features that a direction must certainly exceed to be taken.

        Raises:
            EnergyError: if the energy is outside (0, 1].
            ShapeError: if the basis is not that of the sketch.
            NonFiniteError: if the features held NaN or infinity.
        """
        check_energy(energy)
        same = basis.is_set_to(self.basis) or (
            basis.shape == self.basis.shape and torch.equal(basis.detach().to(self.basis), self.basis)
        )
        if not same:
            raise ShapeError("the basis must be the one that the feature sketch was created with")
        check_finite(self.image, "second moment of the features")
        check_finite(self.totals, "energy of the features")
        total, (fraction, error) = float(self.totals[1]), self.inside
        inside = fraction * total
        if total <= 0.0 or energy_rank(torch.ones(1), energy, total=total, captured=inside) == 0:
            none = self.image.new_zeros(self.dim, 0, dtype=torch.float32)
            return SketchedFeatureDirections(none, fraction, fraction, 0, 0.0, error, 0, True)
        tall = like(basis, self.image)
        squared, directions = self._nystrom(tall)
        missed = max(0.0, total - inside - float(squared.sum()))
        rank = energy_rank(squared, energy, total=total, captured=inside)
        taken, unsure = (above(squared + more, least * total) for more in (0.0, missed))
        rank = limited(min(rank, int((squared > 0.0).sum()), taken), limit)
        held = inside + float(squared[:rank].sum())
        # C's eigenvalues are N's and up to `missed` more, also those that N lacks.
        sure = rank == taken == unsure and missed <= least * total
        return SketchedFeatureDirections(
            new=orthonormalize_against(tall, directions[:, :rank]).float().contiguous(),
            energy_before=inside / total,
            energy_after=min(1.0, held / total),
            rank=rank,
            missed=missed / total,
            energy_error=error,
            fewest=min(rank, energy_rank(squared, energy, total=total, captured=inside + missed)),
            reached=held >= (energy - ROUNDING) * total or rank == limit or sure,
        )

    def held(self, basis: Float[Tensor, "in k"], new: Float[Tensor, "in m"]) -> float:
        """Return a lower bound of the energy's fraction inside the sketch's basis and new directions.

        Of the new directions' energy that part is counted which the sketch can place; the basis's has the
        standard error of `inside`.
        """
        total, (fraction, _) = float(self.totals[1]), self.inside
        if total <= 0.0:
            return 1.0
        squared, directions = self._nystrom(like(basis, self.image))
        placed = (directions.T @ new.to(directions)).square().sum(1)
        return fraction + float((squared * placed).sum()) / total

    def _nystrom(self, basis: Float[Tensor, "in k"]) -> tuple[Float[Tensor, " s"], Float[Tensor, "in s"]]:
        """Return the eigenvalues (descending) and eigenvectors of N, in float64."""
        test, image = self.test.double(), residual(self.image.T, basis).T
        small = test.T @ image
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        certain = values > NOISE * values[-1:].clamp_min(0.0).sum()
        # N = F F^T. Leaving out eigenvalues that may be rounding can only lower N.
        factor = image @ (vectors[:, certain] * values[certain].rsqrt())
        left, singular, _ = torch.linalg.svd(factor, full_matrices=False)
        return singular.square(), left
