"""The energy rule: how many singular directions reach a given fraction of the energy.

Shapes: n = number of singular values.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from llava_keeplora.subspace.errors import EnergyError, NonFiniteError

# Sums that differ by less than this fraction of the total count as equal. It is far below the error of
# float32 singular values (1e-7) and far above the rounding of a float64 sum, so that `energy=1` does not
# include directions that are rounding errors.
TIE = 1e-10


def check_energy(energy: float) -> None:
    """Check that an energy threshold lies in (0, 1].

    Raises:
        EnergyError: if it does not; names the value.
    """
    if not 0.0 < energy <= 1.0:
        raise EnergyError(
            f"energy must lie in (0, 1], the fraction of squared singular values to keep, but it is {energy}"
        )


def energy_rank(
    squared_singular_values: Float[Tensor, " n"],
    energy: float,
    *,
    total: float | None = None,
    captured: float = 0.0,
    strict: bool = False,
) -> int:
    """Return the smallest k for which `captured` plus the first k values reach `energy * total`.

    Source: KeepLoRA (arXiv 2601.19659), the rule for epsilon_w and epsilon_f; with `captured` it is the rule
    of Gradient Projection Memory (Saha et al., ICLR 2021, equation 9).

    Args:
        squared_singular_values: (n,), in descending order; negative ones, from rounding, count as 0.
        energy: the fraction to reach, in (0, 1].
        total: the total energy; the sum of the given values plus `captured` when None.
        captured: energy that earlier directions hold already, in the units of `total`.
        strict: the rule of the released code, which counts the prefixes that stay *below* the threshold and
            so keeps one vector fewer, but never fewer than 1.

    Returns:
        k, between 0 and n; 0 if `captured` suffices, n if even all n values fall short of the threshold.

    Raises:
        EnergyError: if `energy` is outside (0, 1], or `total` or `captured` is negative or not finite.
        NonFiniteError: if a value is NaN or infinite.
    """
    check_energy(energy)
    values = squared_singular_values.detach().double().clamp_min(0.0)
    if not torch.isfinite(values).all():
        raise NonFiniteError("the squared singular values hold NaN or infinity, so no energy rule applies")
    reached = captured + torch.cumsum(values, 0)
    if total is None:
        total = float(reached[-1]) if len(values) else captured
    for name, amount in (("total", total), ("captured", captured)):
        if not (math.isfinite(amount) and amount >= 0.0):
            raise EnergyError(f"{name} energy must be finite and not negative, but it is {amount}")
    threshold = energy * total - TIE * total
    if captured >= threshold:
        return 0
    # One more vector than the longest prefix below the threshold, but not more than there are.
    below = int((reached < threshold).sum())
    return min(max(below, 1) if strict else below + 1, len(values))


def least_share(tasks: int, weight: float, dim: int) -> float:
    """Return the share of the energy above which SplitLoRA protects a direction.

    Its rank minimises tasks (1 - sum of the first n shares) - weight (dim - n) / dim over n. One more
    direction changes this by weight / dim - tasks share, and the shares descend, so that n is the number of
    shares above weight / (tasks dim).

    Source: SplitLoRA (arXiv 2505.22370), the balance of stability and plasticity.

    Args:
        tasks: number of finished tasks, at least 1.
        weight: alpha, what a free direction is worth; 20 as published.
        dim: number of all directions.
    """
    return weight / (tasks * dim)


def guaranteed_room(out_dim: int, in_dim: int, energy: float) -> int:
    """Return how many input directions an energy leaves free, whatever the weight (out_dim, in_dim) is.

    The k largest of n singular values hold at least the share k/n of the energy, so at most ⌈energy · n⌉
    directions are protected.
    """
    return max(0, in_dim - math.ceil(energy * min(out_dim, in_dim)))
