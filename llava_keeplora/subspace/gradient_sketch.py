"""The leading directions of the residual gradient without the gradient itself: a streaming sketch.

A gradient arrives as a sum of dY^T X over batches. Random linear combinations of its columns and of its rows
are linear in it, so that batches, gradient accumulation and processes can be summed. They give A and S in one
pass over the data, an estimate of their quality, and the start of a second pass if that is too low. Two more
passes are one step of subspace iteration: they improve the result in the same memory, while a wider sketch
would take more.

Shapes: n = tokens of a batch, G (out, in), basis U (in, k), P = I - U U^T, G_hat = G P the residual gradient;
w = sketch width, l = 2w + 1 rows, r = rank. The sketch is
    range  Y = G_hat Omega, (out, w), Omega (in, w) Gaussian
    rows   W = Psi G,       (l, in),  Psi (l, out) Gaussian
and Q (out, w) is an orthonormal basis of Y, in order of falling singular value of Y.

Sources: Halko, Martinsson and Tropp, "Finding structure with randomness" (SIAM Review 2011), theorem 10.5,
for Q and the second pass, algorithm 4.4 and corollary 10.10 for further ones; Tropp, Yurtsever, Udell and
Cevher, "Practical sketching algorithms for low-rank matrix approximation" (SIAM J. Matrix Anal. 2017),
algorithm 4 and theorem 4.3, for one pass; the same, "Streaming low-rank matrix approximation with an
application to scientific simulation" (SIAM J. Sci. Comput. 2019), section 6, for the error estimate from rows
that had no part in the result.
"""

import copy
import weakref
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llava_keeplora.subspace.basis import check_basis, check_finite, like, project, residual
from llava_keeplora.subspace.errors import RankError, ShapeError
from llava_keeplora.subspace.gradients import (
    HeldOut,
    ResidualDirections,
    above_rounding,
    flatten_rows,
    max_directions,
    reorthogonalize,
)
from llava_keeplora.subspace.sketch_bounds import PartlyKnown, least_share, share_bounds
from llava_keeplora.subspace.sketch_fit import (
    fit_one_pass,
    fit_two_passes,
    orthonormal_range,
    ratio_of_means,
    root_mean_square,
)

# Width of a sketch in units of the rank. More passes over the data gain more than a wider sketch: for layer
# width 1024, rank 16 and singular values i^-0.5, a sketch of 1.5 r holds 0.989 of the optimum after four
# passes and 0.997 after six; one of 8 r holds 0.992 after two, at five times the memory and five times the
# time (without the model's own).
WIDTH_PER_RANK = 1.5
# Least number of columns beyond the rank; with fewer the quality depends too much on chance.
OVERSAMPLING = 8
# Largest size of a sketch, as a fraction of the gradient's: a larger one is not worth several passes over the
# data, since the gradient itself is exact in one.
WORTH = 0.25
# Fraction of the best rank-r subspace's energy that A must hold.
TARGET = 0.99

_matrices: "weakref.WeakValueDictionary[tuple, Tensor]" = weakref.WeakValueDictionary()


def sketch_width(rank: int) -> int:
    """Return the width of the sketch for r directions: 1.5 r, and at least r + 8.

    Args:
        rank: r.
    """
    return max(round(WIDTH_PER_RANK * rank), rank + OVERSAMPLING)


def gaussian_rows(rows: int, dim: int, stream: int, device: torch.device) -> Float[Tensor, "rows dim"]:
    """Return a Gaussian matrix (rows, dim), the same in every process and shared by all layers that use it.

    Args:
        rows: number of test vectors.
        dim: their length.
        stream: seed; different streams are independent.
        device: device of the result; the numbers are drawn on the CPU, so that they don't depend on it.
    """
    key = (rows, dim, stream, str(device))
    matrix = _matrices.get(key)
    if matrix is None:
        generator = torch.Generator().manual_seed(stream)
        matrix = torch.randn(rows, dim, generator=generator).to(device)
        _matrices[key] = matrix
    return matrix


@dataclass(frozen=True)
class SketchedDirections(ResidualDirections):
    """Residual directions from a sketch, with estimates and bounds of their quality.

    `captured`, `residual_energy` and `of_optimum` are estimates here. With C the energy that A is estimated
    to hold, on rows that had no part in it, and I the energy of the best r directions for the sketch itself,
    E[C] <= optimum <= E[I], and the errors of both sides are equal to second order. `at_least` and
    `residual_bounds` are bounds that hold for any spectrum, except with a probability below 3e-6; see
    `sketch_bounds`. They are the looser, the more energy lies outside the sketch.

    Args:
        captured_error: standard error of `captured`; A holds at least `captured` minus twice that with 97.5 %
            confidence (after one pass the estimate is also biased low, since directions from three quarters
            of the rows are evaluated on the others).
        of_optimum: estimated fraction of the best rank-r subspace's energy that A holds, 2C / (C + I).
        at_least: lower bound of that fraction.
        residual_bounds: lower and upper bound of `residual_energy`.
        passes: number of passes over the data, 1 or an even number.
    """

    captured_error: float
    of_optimum: float
    at_least: float
    residual_bounds: tuple[float, float]
    passes: int

    def suffices(self, target: float = TARGET) -> bool:
        """Return whether A holds the target fraction of the best subspace's energy, by the estimate C / I."""
        return self.of_optimum / (2.0 - self.of_optimum) >= target


class GradientSketch:
    """Streaming sketch of a layer's residual gradient in (out + 3 in) w numbers, for any amount of data.

    A batch costs 6 w (in + out) operations per token, compared with 4 in out for the layer's own forward and
    backward pass with frozen weights.

    Source: Tropp, Yurtsever, Udell and Cevher (2017). One pass, with q = Q^+ of the rows, satisfies
    E ||G_hat - Q B||_F^2 <= 2 (1 + p / (w - p - 1)) tau_{p+1}^2 for every p < w - 1, tau_{p+1}^2 being the
    energy beyond the p-th singular value (theorem 4.3 with l = 2w + 1); the second pass drops the factor 2.

    Args:
        out_dim: out.
        in_dim: in.
        width: w, see `sketch_width`; reduced to min(out, in) if larger, which is exact.
        basis: U, (in, k), the protected subspace; empty when None.
        seed: seed of the test matrices, the same in every process.
        device: device of the buffers.

    Raises:
        ShapeError: if the width is below 1, or the basis doesn't fit the layer.
    """

    def __init__(
        self,
        out_dim: int,
        in_dim: int,
        width: int,
        basis: Tensor | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        if width < 1:
            raise ShapeError(f"a sketch needs a width of at least 1, but it is {width}")
        self.basis = torch.zeros(in_dim, 0) if basis is None else basis.detach()
        check_basis(self.basis, in_dim, "a gradient sketch")
        self.width = min(width, out_dim, in_dim)
        self.shape = (out_dim, in_dim)
        self.seed = seed
        self.passes = 0
        device = torch.device(device)
        # Even and odd streams, so that the two sides are independent.
        self._psi = gaussian_rows(2 * self.width + 1, out_dim, 2 * seed, device)
        omega = gaussian_rows(self.width, in_dim, 2 * seed + 1, device)
        self._omega = residual(omega, self.basis).T
        self.range = torch.zeros(out_dim, self.width, device=device)
        self.rows = torch.zeros(2 * self.width + 1, in_dim, device=device)

    @staticmethod
    def numbers(out_dim: int, in_dim: int, width: int) -> int:
        """Return how many numbers a layer's sketch holds (Psi is shared); the gradient has out * in."""
        width = min(width, out_dim, in_dim)
        return (out_dim + 3 * in_dim) * width + in_dim

    @classmethod
    def is_worth_it(cls, out_dim: int, in_dim: int, width: int) -> bool:
        """Return whether a sketch is enough smaller than the gradient to be worth further passes."""
        return cls.numbers(out_dim, in_dim, width) <= WORTH * out_dim * in_dim

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers of `add`, to be summed over processes in place before `directions` is called."""
        return [self.range] if self.passes else [self.range, self.rows]

    @torch.no_grad()
    def add(self, x: Float[Tensor, "... in"], dy: Float[Tensor, "... out"]) -> None:
        """Add a batch's dY^T X.

        Args:
            x: the layer's input, (..., in), any floating dtype.
            dy: gradient of the loss with respect to its output, (..., out).

        Raises:
            ShapeError: if they don't fit the layer or each other.
        """
        x2, dy2 = flatten_rows(x, dy, self.shape[1], self.shape[0])
        self.range.addmm_(dy2.T, x2 @ self._omega)
        # The rows are the same in every pass, so they are summed in the first alone.
        if not self.passes:
            self.rows.addmm_((dy2 @ self._psi.T).T, x2)

    def merge(self, other: "GradientSketch") -> None:
        """Add another sketch of the same layer, for instance of another process.

        Raises:
            ShapeError: if the layers, widths, seeds or numbers of passes differ.
        """
        key, other_key = (
            (sketch.shape, sketch.width, sketch.seed, sketch.passes) for sketch in (self, other)
        )
        if key != other_key:
            raise ShapeError(
                f"sketches of other layers, widths or seeds can't be merged: {key} and {other_key}"
            )
        for buffer, addend in zip(self.tensors, other.tensors):
            buffer.add_(addend.to(buffer.device))

    def narrowed(self, width: int) -> "GradientSketch":
        """Return the sketch that a smaller width would have given, from a part of this one's numbers.

        Args:
            width: at most this sketch's width.

        Raises:
            ShapeError: if the width is below 1 or above this sketch's.
        """
        if not 1 <= width <= self.width:
            raise ShapeError(
                f"a sketch of width {self.width} can be narrowed to 1 to {self.width}, not to {width}"
            )
        other = copy.copy(self)
        other.width = width
        other._psi, other._omega = self._psi[: 2 * width + 1], self._omega[:, :width]
        other.range, other.rows = self.range[:, :width].clone(), self.rows[: 2 * width + 1].clone()
        return other

    def second_pass(self) -> "SecondPass":
        """Return an empty statistic for a second pass over the same data, which gives the exact Q^T G.

        This sketch must be complete and summed over processes.
        """
        return SecondPass(orthonormal_range(self.range).float(), self.shape[1])

    #: Whether `directions` may fall short, so that further passes over the data are needed.
    further_passes = True

    def held_out(self, rank: int) -> HeldOut:
        """Return directions from three quarters of the rows, and the others, which had no part in them.

        The energy of Psi G_hat on rows of Psi is, divided by their number, that of G_hat on average. The
        directions are less good than those of `directions`, so they only serve to compare sketches of the
        same stream.

        Args:
            rank: r, at most the width.
        """
        check_finite(self.rows, "gradient")
        rows = residual(self.rows.double(), like(self.basis, self.rows.double()))
        fitted = len(rows) * 3 // 4
        seen = (self._psi.double() @ orthonormal_range(self.range))[:, : min(rank, self.width)]
        factor = torch.linalg.lstsq(seen[:fitted], rows[:fitted]).solution
        held_out = rows[fitted:]
        A = torch.linalg.svd(factor, full_matrices=False).Vh[:rank].T
        return HeldOut(A, held_out / len(held_out) ** 0.5)

    def forget_range(self) -> None:
        """Free the buffers of `add`, `merge` and `second_pass`; a second pass then needs no further memory.

        `refined`, and `directions` with a second pass, can still be called.
        """
        self.range = self._omega = None

    def refined(self, second: "SecondPass") -> "GradientSketch":
        """Return a sketch for two more passes over the same data.

        Its test vectors are the right singular vectors of Q^T G_hat. This is one step of subspace iteration:
        the angles to the wanted directions shrink by up to (sigma_{w+1} / sigma_r)^2. Only the range is
        summed again; the rows, on which no Q depends, are reused, as is the estimate from them.

        Source: Halko, Martinsson and Tropp (2011), algorithm 4.4 and corollary 10.10.

        Args:
            second: the finished second pass.
        """
        rows = second.rows.double()
        basis = like(self.basis, rows)
        vectors = torch.linalg.svd(residual(rows, basis), full_matrices=False).Vh
        other = copy.copy(self)
        # If Q^T G_hat has a lower rank than rows, the other vectors are arbitrary: project all of them
        # outside the basis.
        other._omega = residual(residual(vectors, basis), basis).float().T
        other.range = torch.zeros(self.shape[0], self.width, device=self.rows.device)
        other.passes = self.passes + 2
        return other

    def directions(
        self, rank: int, second: "SecondPass | None" = None, *, allow_fewer: bool = False
    ) -> SketchedDirections:
        """Return the top r directions of the residual gradient, with estimates of their quality.

        Source: KeepLoRA (arXiv 2601.19659), the residual gradient and the initialisation of A and B_0.

        Args:
            rank: r, at least 1 and at most the width.
            second: the finished second pass, if there was one.
            allow_fewer: whether fewer than r directions (but at least one) are returned if there are no more.

        Raises:
            NonFiniteError: if the gradient held NaN or infinity.
            RankError: if r is below 1, above the width or above the residual dimension, or if the residual
                gradient has fewer than r singular values above rounding.
        """
        (out_dim, in_dim), width = self.shape, self.width
        most = max_directions(rank, out_dim, in_dim, self.basis.shape[1], allow_fewer)
        if rank > width and width < most:
            raise RankError(
                f"a sketch of width {width} can't give {rank} directions", requested=rank, available=width
            )
        check_finite(self.rows, "gradient")
        all_rows = self.rows.double()
        basis = like(self.basis, all_rows)
        rows = residual(all_rows, basis)
        range_basis = orthonormal_range(self.range) if second is None else second.range_basis.double()
        seen = self._psi.double() @ range_basis
        if second is None:
            fit = fit_one_pass(rows, seen, min(rank, width))
        else:
            fit = fit_two_passes(rows, seen, residual(second.rows.double(), basis), min(rank, width))
        inside = PartlyKnown.of(
            all_rows - rows, seen, None if second is None else project(second.rows.double(), basis)
        )
        near, singular, right = torch.linalg.svd(fit.factor, full_matrices=False)
        count = above_rounding(singular[:rank], root_mean_square(all_rows), rank, most, allow_fewer)
        captured, captured_error = ratio_of_means(fit.captured, fit.energy)
        held = float(fit.captured.mean())
        outside = PartlyKnown.of(rows, seen, None if second is None else fit.factor)
        return SketchedDirections(
            A=reorthogonalize(right[:count].T, basis).float().contiguous(),
            singular_values=singular[:count].float(),
            right=(range_basis[:, : near.shape[0]] @ near[:, :count]).float().contiguous(),
            captured=min(1.0, captured),
            residual_energy=outside.estimate / (outside.estimate + inside.estimate),
            captured_error=captured_error,
            of_optimum=min(1.0, 2 * held / (held + fit.optimum)),
            at_least=least_share(
                float(singular[:count].square().sum()),
                fit.error,
                fit.most,
                outside.bounds[1] + inside.bounds[1],
            ),
            residual_bounds=share_bounds(outside.bounds, inside.bounds),
            passes=self.passes + (1 if second is None else 2),
        )


class SecondPass:
    """Exact Q^T G, (w, in), summed in another pass over the same data; linear like the sketch.

    Source: Halko, Martinsson and Tropp (2011), algorithm 5.1: E ||G_hat - Q Q^T G_hat||_F^2 is at most
    (1 + p / (w - p - 1)) times the energy beyond the p-th singular value (theorem 10.5), and directions drawn
    from Q^T G have been multiplied by G once more than Q.

    Args:
        range_basis: Q, (out, w), orthonormal columns.
        in_dim: in.
    """

    def __init__(self, range_basis: Float[Tensor, "out w"], in_dim: int):
        self.range_basis = range_basis
        self.rows = torch.zeros(range_basis.shape[1], in_dim, device=range_basis.device)

    @property
    def tensors(self) -> list[Tensor]:
        """The buffer, to be summed over processes in place."""
        return [self.rows]

    @torch.no_grad()
    def add(self, x: Float[Tensor, "... in"], dy: Float[Tensor, "... out"]) -> None:
        """Add a batch's Q^T dY^T X; the arguments are those of `GradientSketch.add`.

        Raises:
            ShapeError: if they don't fit the layer or each other.
        """
        x2, dy2 = flatten_rows(x, dy, self.rows.shape[1], self.range_basis.shape[0])
        self.rows.addmm_((dy2 @ self.range_basis).T, x2)

    def merge(self, other: "SecondPass") -> None:
        """Add another process's second pass over its data.

        Raises:
            ShapeError: if the passes have different Q.
        """
        if other.range_basis.shape != self.range_basis.shape or not torch.allclose(
            other.range_basis, self.range_basis
        ):
            raise ShapeError("second passes that started from different sketches can't be merged")
        self.rows.add_(other.rows.to(self.rows.device))


def sufficient_width(sketch: GradientSketch, rank: int, target: float = TARGET) -> int | None:
    """Return the smallest width, halving from the sketch's own, whose single pass reaches the target.

    With it, a wide sketch of a few batches determines the width for all of the data. None if no width
    suffices.

    Args:
        sketch: the wide sketch.
        rank: r.
        target: fraction of the best rank-r subspace's energy.

    Raises:
        RankError: as `GradientSketch.directions` does.
    """
    sufficient = None
    width = sketch.width
    while width >= rank and sketch.narrowed(width).directions(rank, allow_fewer=True).suffices(target):
        sufficient, width = width, width // 2
    return sufficient
