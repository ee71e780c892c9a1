"""Bounds of energies that are known only through Gaussian test vectors, and their confidence.

Shapes: M any matrix (out, in), Psi (l, out) standard Gaussian and independent of M, so |psi_i M|^2 has mean
||M||_F^2.

The bound: sum_i |psi_i M|^2 / l lies in [c, C] ||M||_F^2, each side except with a probability delta, where
c < 1 < C solve x - 1 - ln x = 2 ln(1 / delta) / l. Proof: with the eigenvalues mu_j of M M^T, summing to
||M||_F^2 = 1, the sum is sum_ij mu_j z_ij^2 / l over independent standard normals z. Its logarithmic moment
generating function is -1/2 sum_ij ln(1 - 2 t mu_j / l), for either sign of t a convex function of mu, so over
the simplex it is largest where one mu_j is 1, where the sum is chi^2_l / l. Chernoff's bound of that,
P(chi^2_l / l beyond x) <= (x e^(1 - x))^(l / 2), holds for every M, whatever its spectrum.

Source of the tail of chi^2: Dasgupta and Gupta, "An elementary proof of a theorem of Johnson and
Lindenstrauss" (2003), lemma 2.2.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Probability with which one inequality may fail; a result uses fewer than thirty of them.
CHANCE = 1e-7
# Norm of the rounding in a float32 sum of products, as a fraction of the whole gradient's norm; observed are
# an eighth of it over 64 batches and a quarter over 512. It does not cover much longer sums of gradients that
# cancel.
ROUNDING = 8 * torch.finfo(torch.float32).eps


@cache
def chi_square_factors(rows: int, chance: float = CHANCE) -> tuple[float, float]:
    """Return (c, C): a mean of squared norms |psi_i M|^2 is at least c and at most C times ||M||_F^2.

    Args:
        rows: l, the number of test vectors.
        chance: delta, the probability with which each side may fail.
    """
    wanted = -2.0 * math.log(chance) / rows
    least, most = _crossing(wanted, 1.0, math.exp(-1.0 - wanted)), _crossing(wanted, 1.0, 4.0 + 2.0 * wanted)
    return least, most


def _crossing(wanted: float, inner: float, outer: float) -> float:
    """Return where x - 1 - ln x reaches a value, by bisection; the outer end of the last interval.

    The function grows in both directions from 1, so `inner` is the end of the interval nearer to 1.
    """
    for _ in range(100):
        middle = (inner + outer) / 2
        if middle - 1.0 - math.log(middle) < wanted:
            inner = middle
        else:
            outer = middle
    return outer


class PartlyKnown(NamedTuple):
    """The energy ||F||^2 + ||M||^2 of a matrix, where F is known exactly and M only through Psi M.

    Args:
        known: ||F||^2.
        missed: Psi M, (l, in).
    """

    known: float
    missed: Tensor

    @classmethod
    def of(
        cls, rows: Float[Tensor, "l in"], seen: Float[Tensor, "l w"], exact: Tensor | None
    ) -> "PartlyKnown":
        """Describe a matrix X by its rows Psi X, and by Q^T X, if that is known.

        Args:
            rows: Psi X.
            seen: Psi Q.
            exact: Q^T X, (w, in), or None.
        """
        return cls(0.0, rows) if exact is None else cls(float(exact.square().sum()), rows - seen @ exact)

    @property
    def estimate(self) -> float:
        """Unbiased estimate of the energy."""
        return self.known + float(self.missed.square().sum()) / len(self.missed)

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the energy."""
        least, most = chi_square_factors(len(self.missed))
        mean = self.estimate - self.known
        return self.known + mean / most, self.known + mean / least


def share_bounds(part: tuple[float, float], rest: tuple[float, float]) -> tuple[float, float]:
    """Return bounds of part / (part + rest) for two energies with bounds, rounding included.

    Args:
        part, rest: lower and upper bound of each energy.
    """
    rounding = ROUNDING * math.sqrt(part[1] + rest[1])
    (least, most), (rest_least, rest_most) = (_rounded(bounds, rounding) for bounds in (part, rest))
    if most + rest_most <= 0.0:
        return 0.0, 1.0
    return least / max(least + rest_most, 1e-300), most / max(most + rest_least, 1e-300)


def _rounded(bounds: tuple[float, float], rounding: float) -> tuple[float, float]:
    least, most = (math.sqrt(value) for value in bounds)
    return max(0.0, least - rounding) ** 2, (most + rounding) ** 2


def least_share(held: float, error: float, most: float, whole: float) -> float:
    """Return a lower bound of ||G_hat A||^2 divided by the energy of the best r directions.

    ||G_hat A|| >= ||Q^T G_hat A|| >= ||B A|| - ||B - Q^T G_hat||, for any B and any Q with orthonormal
    columns.

    Args:
        held: ||B A||^2.
        error: an upper bound of ||B - Q^T G_hat||_F; 0 if B is exact.
        most: an upper bound of the best r directions' energy.
        whole: an upper bound of ||G||_F^2, for the rounding.
    """
    rounding = ROUNDING * math.sqrt(whole)
    best = math.sqrt(most) + rounding
    return (max(0.0, math.sqrt(held) - error - rounding) / best) ** 2 if best > 0.0 else 0.0


def fit_error(seen: Float[Tensor, "l d"], missed: Float[Tensor, "l in"]) -> tuple[float, float]:
    """Return bounds of the error of least squares on rows, and of the part of G_hat outside Q.

    The rows of G_hat are Psi Q (Q^T G_hat) + Psi M with M = G_hat - Q Q^T G_hat, and Psi Q is independent of
    Psi M, since Q is orthogonal to M. So the error of the solution B is (Psi Q)^+ Psi M, whose norm is at
    most ||(Psi Q)^+||_2 times that of the d dimensions of Psi M inside the span of Psi Q; the remaining l - d
    dimensions give ||M||_F.

    Args:
        seen: Psi Q, l > d.
        missed: Psi G_hat - Psi Q B.

    Returns:
        upper bounds of ||B - Q^T G_hat||_F and of ||M||_F^2.
    """
    rows, depth = seen.shape
    outside = float(missed.square().sum()) / ((rows - depth) * chi_square_factors(rows - depth)[0])
    smallest = float(torch.linalg.svdvals(seen)[-1])
    inside = depth * chi_square_factors(depth)[1] * outside
    return math.sqrt(inside) / smallest if smallest > 0.0 else math.inf, outside
