"""Which feature directions a task adds, from a bounded number of numbers: a streaming Nystrom sketch.

The second moment of a layer's inputs takes in^2 numbers. Here only its product with s test vectors is kept,
which is linear in it, so batches and processes add up. The features' energy is kept exactly. The basis, which
would take as much
memory as the second moment, stays on the host: how much of the energy lies inside it is asked of evenly
spaced rows at the end, exactly where there are at most `SAMPLE` of them, with a standard error where there
are more.

Shapes: x (..., in), C = X^T X (in, in), basis U (in, k), P = I - U U^T, residual moment C_hat = P C P,
test vectors T (in, s) orthonormal and outside U, image C T (in, s), s = sketch size, m = new directions.

Source: Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from
streaming data" (NeurIPS 2017). The Nystrom approximation N = C_hat T (T^T C_hat T)^+ T^T C_hat satisfies 0 <=
N <= C_hat, so its eigenvalues, and the energy it says its eigenvectors hold, are never above the truth; and
E trace(C_hat - N) <= (1 + p / (s - p - 1)) times the sum of C_hat's eigenvalues beyond the p-th, for every p
< s - 1 (theorem 4.1; Halko, Martinsson and Tropp 2011, theorem 10.5).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llava_keeplora.subspace.basis import check_basis, check_finite, like, orthonormal_beside, residual
from llava_keeplora.subspace.energy import check_energy, energy_rank
from llava_keeplora.subspace.errors import ShapeError
from llava_keeplora.subspace.features import FeatureDirections, limited
from llava_keeplora.subspace.moments import counted_rows

# Eigenvalues of T^T C T below this share of the largest are rounding of the float32 products.
NOISE = 16 * torch.finfo(torch.float32).eps
# Rounding of the energies, as a share of the whole.
ROUNDING = 1e-6
# Bytes per input of one sketched direction: the image in float64, the test vector in float32.
BYTES = 12
# Fewer directions than this aren't worth a pass over the data.
SMALLEST = 16
# Rows that are asked for the share inside the basis, at least; up to twice as many are held.
SAMPLE = 512


@dataclass(frozen=True)
class SketchedFeatureDirections(FeatureDirections):
    """What a task's features add to a layer's basis, by a sketch.

    `energy_after` is a lower bound where every row was asked for `energy_before`; where they were sampled,
    both carry its standard error, `energy_error`, and `fewest` and `reached` follow the estimate.

    Args:
        missed: share of the features' energy that the sketch can't place, trace(C_hat - N) / ||X||^2.
        energy_error: standard error of `energy_before`, and so of the shares after it; 0 where every row was
            asked.
        fewest: the exact second moment would have given between `fewest` and `rank` directions.
        reached: whether the energy asked for is reached, or the limit; where neither is, `rank` is all that
            the sketch has, and a second pass with `refined` or a larger sketch is needed.
    """

    missed: float
    energy_error: float
    fewest: int
    reached: bool


class _RowSample:
    """Evenly spaced rows of everything seen, on the host.

    Every one while there are few, every second, fourth, ... then.
    """

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.seen, self.stride = 0, 1

    def add(self, rows: Float[Tensor, "n in"], dtype: torch.dtype) -> None:
        """Take what is picked of float32 rows, kept in the precision that they came in."""
        # Thinned before they leave the device; copied, so that none keeps the batch that it is a part of.
        while -(-(self.seen + len(rows)) // self.stride) > 2 * SAMPLE:
            self.rows = [torch.cat(self.rows)[::2].clone()] if self.rows else []
            self.stride *= 2
        if len(picked := rows[-self.seen % self.stride :: self.stride]):
            self.rows.append(picked.to("cpu", dtype, copy=True))
        self.seen += len(rows)

    def take(self) -> Float[Tensor, "n in"]:
        """The rows, at least one, which are forgotten here."""
        rows = torch.cat(self.rows)
        self.__init__()
        return rows


class SketchedMoment:
    """Streaming sketch of the residual second moment, of 12 in s bytes.

    For where a `SecondMoment` doesn't fit.

    Args:
        dim: the layer's input width.
        size: s; at most in - k are kept, which is exact.
        basis: U, (in, k), the protected subspace whose complement is sketched; nothing is protected when
            absent.
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
        self.basis = torch.zeros(dim, 0) if basis is None else basis.detach().float()
        check_basis(self.basis, dim, "a feature sketch")
        size = min(size, dim - self.basis.shape[1])
        if test is None:
            test = torch.randn(max(size, 0), dim, generator=torch.Generator().manual_seed(seed)).T
        # N depends on the span of T alone; orthonormal columns keep the small problem as well conditioned as
        # C is.
        test = test.to(device).double()
        outside_of = like(self.basis, test)
        columns = torch.linalg.qr(residual(test.T, outside_of).T).Q
        # Where there are fewer dimensions to span, QR fills up with columns of its own, which may lie
        # anywhere.
        self.test = residual(columns.T, outside_of).T.float().contiguous()
        self.image = torch.zeros(dim, self.test.shape[1], dtype=torch.float64, device=device)
        # Rows and their energy.
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        self._sample = _RowSample()
        # Of the sampled rows: their number, energy t, energy i inside the basis, and the sums of t^2, t i and
        # i^2.
        self._asked = torch.zeros(6, dtype=torch.float64, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers: sum them over processes, in place, before asking for directions."""
        self._ask_sample()
        return [self.image, self.totals, self._asked]

    def _ask_sample(self) -> None:
        if not self._sample.rows:
            return
        rows = self._sample.take().to(self.image.device).float()
        inside = (rows @ like(self.basis, rows)).double().square().sum(1)
        whole = rows.double().square().sum(1)
        self._asked += torch.stack(
            [
                whole.new_tensor(len(rows)),
                *(v.sum() for v in (whole, inside, whole**2, whole * inside, inside**2)),
            ]
        )

    @property
    def sampled_bytes(self) -> int:
        """Of the rows that are held on the host now."""
        return sum(rows.nbytes for rows in self._sample.rows)

    def most_sampled_bytes(self, itemsize: int) -> int:
        """Of the rows at their most.

        Args:
            itemsize: bytes of a number of the features.
        """
        return 2 * SAMPLE * self.dim * itemsize

    @property
    def count(self) -> int:
        """Rows seen."""
        return int(self.totals[0])

    @property
    def inside(self) -> tuple[float, float]:
        """Share of the features' energy inside the basis, and its standard error.

        1 and 0 if there is no energy at all.

        A ratio estimate over evenly spaced rows (Cochran, "Sampling Techniques", 1977, section 6.4), with the
        finite population's correction.
        """
        self._ask_sample()
        n, whole, inside, ww, wi, ii = self._asked.tolist()
        if whole <= 0.0:
            return 1.0, 0.0
        share = inside / whole
        variance = max(0.0, ii - 2 * share * wi + share**2 * ww) * max(0.0, 1.0 - n / self.count)
        return share, variance**0.5 / whole

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
        # Lengths in float32 and their squares in float64 are right to 1e-8, in a quarter of the time of
        # converting every number.
        self.totals[1] += torch.linalg.vector_norm(rows, dim=1).double().square().sum()
        self._sample.add(rows, x.dtype)

    def merge(self, other: "SketchedMoment") -> None:
        """Add another stream's sums and count, as from another process.

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
        """Return an empty sketch for a second pass over the same data.

        Its test vectors span the first one's image.

        One step of subspace iteration: what the first pass missed shrinks by the ratio of the missed
        eigenvalues to the wanted ones, squared. This sketch must be complete and summed.
        """
        return SketchedMoment(
            self.dim, self.test.shape[1], self.basis, device=self.image.device, test=self.image
        )

    def directions(
        self, basis: Float[Tensor, "in k"], energy: float, limit: int | None = None
    ) -> SketchedFeatureDirections:
        """Return the fewest sketched directions that surely hold the energy together with the basis.

        Source: KeepLoRA (arXiv 2601.19659), the feature step at epsilon_f; Gradient Projection Memory (Saha
        et al., ICLR 2021, equation 9), with lower bounds of the energies.

        Args:
            basis: U, (in, k), the one that the sketch was made for, on any device.
            energy: epsilon_f, in (0, 1].
            limit: the most directions, the strongest ones; as many as the energy takes when None.

        Raises:
            EnergyError: if the energy is outside (0, 1].
            ShapeError: if the basis isn't the sketch's.
            NonFiniteError: if the features held NaN or infinity.
        """
        check_energy(energy)
        same = basis.is_set_to(self.basis) or (
            basis.shape == self.basis.shape and torch.equal(basis.detach().to(self.basis), self.basis)
        )
        if not same:
            raise ShapeError("a feature sketch only answers for the basis that it was made for")
        check_finite(self.image, "second moment of the features")
        check_finite(self.totals, "energy of the features")
        total, (share, error) = float(self.totals[1]), self.inside
        inside = share * total
        if total <= 0.0 or energy_rank(torch.ones(1), energy, total=total, captured=inside) == 0:
            return SketchedFeatureDirections(
                self.image.new_zeros(self.dim, 0, dtype=torch.float32), share, share, 0, 0.0, error, 0, True
            )
        tall = like(basis, self.image)
        squared, directions = self._nystrom(tall)
        missed = max(0.0, total - inside - float(squared.sum()))
        rank = energy_rank(squared, energy, total=total, captured=inside)
        rank = limited(min(rank, int((squared > 0.0).sum())), limit)
        held = inside + float(squared[:rank].sum())
        return SketchedFeatureDirections(
            new=orthonormal_beside(tall, directions[:, :rank]).float().contiguous(),
            energy_before=inside / total,
            energy_after=min(1.0, held / total),
            rank=rank,
            missed=missed / total,
            energy_error=error,
            fewest=min(rank, energy_rank(squared, energy, total=total, captured=inside + missed)),
            reached=held >= (energy - ROUNDING) * total or rank == limit,
        )

    def _nystrom(self, basis: Float[Tensor, "in k"]) -> tuple[Float[Tensor, " s"], Float[Tensor, "in s"]]:
        """Eigenvalues (descending) and eigenvectors of N, in float64."""
        test, image = self.test.double(), residual(self.image.T, basis).T
        small = test.T @ image
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        certain = values > NOISE * values[-1:].clamp_min(0.0).sum()
        # N = F F^T. What is left out here as rounding only lowers N.
        factor = image @ (vectors[:, certain] * values[certain].rsqrt())
        left, singular, _ = torch.linalg.svd(factor, full_matrices=False)
        return singular.square(), left
