"""The one energy rule: how many singular directions reach a stated share of the energy.

Shapes: n = number of singular values.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from llava_keeplora.subspace.errors import EnergyError, NonFiniteError

# Sums that differ by less than this share of the total are a tie. It sits far below the error of float32
# singular values (1e-7) and far above the rounding of a float64 sum, so `energy=1` doesn't chase directions
# made of rounding.
TIE = 1e-10


def check_energy(energy: float) -> None:
    """Refuse an energy threshold outside (0, 1].

    Raises:
        EnergyError: with the offending value.
    """
    if not 0.0 < energy <= 1.0:
        raise EnergyError(
            f"energy must lie in (0, 1], as the share of squared singular values to keep, but it is {energy}"
        )


def energy_rank(
    squared_singular_values: Float[Tensor, " n"],
    energy: float,
    *,
    total: float | None = None,
    captured: float = 0.0,
    strict: bool = False,
) -> int:
    """Return the smallest k whose first k squared singular values reach `energy * total`.

    What is captured already counts.

    Source: KeepLoRA (arXiv 2601.19659), the rule for epsilon_w and epsilon_f; with `captured` it is the rule
    of Gradient Projection Memory (Saha et al., ICLR 2021, equation 9).

    Args:
        squared_singular_values: (n,), in descending order; rounding may leave tiny negative ones, read as 0.
        energy: the share to reach, in (0, 1].
        total: the whole energy; the sum of the given values plus `captured` when absent.
        captured: energy that earlier directions hold already, in the units of `total`.
        strict: the rule of the released code, which counts the prefixes that stay *below* the threshold and
            so keeps one vector fewer, but never fewer than 1.

    Returns:
        k, between 0 and n; 0 if `captured` suffices, n if even all n values fall short of the threshold.

    Raises:
        EnergyError: if `energy` is outside (0, 1], or `total` or `captured` is negative or not finite.
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
    # Every prefix below the threshold needs one more vector; rounding must not ask for more than exist.
    below = int((reached < threshold).sum())
    return min(max(below, 1) if strict else below + 1, len(values))
