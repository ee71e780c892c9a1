"""Bounds of energies that are known through Gaussian test vectors alone, and how sure they are.

Shapes: M any matrix (out, in), Psi (l, out) standard Gaussian and independent of M, so |psi_i M|^2 has mean
||M||_F^2.

The bound: sum_i |psi_i M|^2 / l lies in [c, C] ||M||_F^2, each side but for a probability delta, where
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

# Probability with which one inequality may fail; an answer takes fewer than thirty of them.
CHANCE = 1e-7
# Norm of the rounding in a float32 sum of products, as a share of the whole gradient's; seen: an eighth of it
# over 64 batches, a quarter over 512. The rounding of much longer sums, of gradients that cancel, isn't in
# it.
ROUNDING = 8 * torch.finfo(torch.float32).eps


@cache
def chi_square_factors(rows: int, chance: float = CHANCE) -> tuple[float, float]:
    """C and C: a mean of squared lengths |psi_i M|^2 is at least c and at most C times ||M||_F^2.

    Args:
        rows: l, the number of test vectors.
        chance: delta, with which each side may fail.
    """
    wanted = -2.0 * math.log(chance) / rows
    least, most = _crossing(wanted, 1.0, math.exp(-1.0 - wanted)), _crossing(wanted, 1.0, 4.0 + 2.0 * wanted)
    return least, most


def _crossing(wanted: float, inner: float, outer: float) -> float:
    """Where x - 1 - ln x, which grows away from 1, reaches a value; the outer end of the last interval."""
    for _ in range(100):
        middle = (inner + outer) / 2
        if middle - 1.0 - math.log(middle) < wanted:
            inner = middle
        else:
            outer = middle
    return outer


class PartlyKnown(NamedTuple):
    """The energy ||F||^2 + ||M||^2 of a matrix, of which the first is known and the second through Psi M.

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
        """A matrix X by its rows Psi X, and by Q^T X, (w, in), where that is known; `seen` is Psi Q."""
        return cls(0.0, rows) if exact is None else cls(float(exact.square().sum()), rows - seen @ exact)

    @property
    def estimate(self) -> float:
        """The energy on average over Psi."""
        return self.known + float(self.missed.square().sum()) / len(self.missed)

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and most of the energy."""
        least, most = chi_square_factors(len(self.missed))
        mean = self.estimate - self.known
        return self.known + mean / most, self.known + mean / least


def share_bounds(part: tuple[float, float], rest: tuple[float, float]) -> tuple[float, float]:
    """Least and most of part / (part + rest), for two energies between bounds, rounding included.

    Args:
        part, rest: least and most of each.
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
    """A lower bound of ||G_hat A||^2 over the energy of the best r directions.

    ||G_hat A|| >= ||Q^T G_hat A|| >= ||B A|| - ||B - Q^T G_hat||, for any B and any Q with orthonormal
    columns.

    Args:
        held: ||B A||^2.
        error: a bound of ||B - Q^T G_hat||_F; 0 where B is exact.
        most: a bound of the best r directions' energy.
        whole: a bound of ||G||_F^2, for the rounding.
    """
    rounding = ROUNDING * math.sqrt(whole)
    best = math.sqrt(most) + rounding
    return (max(0.0, math.sqrt(held) - error - rounding) / best) ** 2 if best > 0.0 else 0.0


def fit_error(seen: Float[Tensor, "l d"], missed: Float[Tensor, "l in"]) -> tuple[float, float]:
    """How far least squares on rows can be from Q^T G_hat, and how much of G_hat can lie outside Q.

    The rows of G_hat are Psi Q (Q^T G_hat) + Psi M with M = G_hat - Q Q^T G_hat, and Psi Q is independent of
    Psi M, since Q is orthogonal to M. So the solution B is off by (Psi Q)^+ Psi M, whose norm is at most
    ||(Psi Q)^+||_2 times that of the d dimensions of Psi M inside the span of Psi Q; what is left in the
    other l - d dimensions tells ||M||_F.

    Args:
        seen: Psi Q, l > d.
        missed: Psi G_hat - Psi Q B.

    Returns:
        bounds of ||B - Q^T G_hat||_F and of ||M||_F^2.
    """
    rows, depth = seen.shape
    outside = float(missed.square().sum()) / ((rows - depth) * chi_square_factors(rows - depth)[0])
    smallest = float(torch.linalg.svdvals(seen)[-1])
    inside = depth * chi_square_factors(depth)[1] * outside
    return math.sqrt(inside) / smallest if smallest > 0.0 else math.inf, outside
