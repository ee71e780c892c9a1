"""Projection of an update off a protected subspace, and how much of its energy that takes away.

Legend: in / out features of a layer, r rank, k protected dimensions. ΔW (out, in) is an update, M (in, k) the
protected subspace, orthonormal columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from llava_keeplora.adapters.combine import compress
from llava_keeplora.adapters.deltas import Delta, Deltas, FullDelta
from llava_keeplora.subspace import residual

#: Relative size below which what is left of an update is rounding of its fp32 numbers.
ROUNDING = 1e-6


def project_deltas(deltas: Deltas, bases: Mapping[str, Tensor]) -> dict[str, Delta | FullDelta]:
    """Project the updates of all layers that have a protected subspace, see `project_off`; keep the others.

    Args:
        deltas: layer name → its update; layers of which nothing is left are missing in the result.
        bases: layer name → M, (in, k).
    """
    projected = {
        name: project_off(delta, bases[name]) if name in bases else delta for name, delta in deltas.items()
    }
    return {name: delta for name, delta in projected.items() if delta is not None}


def project_off(delta: Delta | FullDelta, basis: Tensor) -> Delta | FullDelta | None:
    """Return ΔW (I − M Mᵀ), an update of the same kind that no input inside M can feel.

    Source: KeepLoRA (arXiv 2601.19659), the residual projection, applied to an update instead of a gradient.

    Args:
        delta: the update of a linear layer's weight; a low-rank one keeps its B.
        basis: M, (in, k).

    Returns:
        the projected update, of a lower rank where directions vanish; None if nothing is left.
    """
    M = basis.double()
    if isinstance(delta, FullDelta):
        weight = _outside(delta.parameters["weight"], M)
        left = bool(weight.norm() > ROUNDING * squared_norm(delta) ** 0.5)
        return FullDelta({**delta.parameters, "weight": weight.float()}) if left else None
    projected = Delta(_outside(delta.A, M), delta.B.double(), delta.scale)
    singular_values = compress(projected, len(delta.A))[1]
    rank = int((singular_values > ROUNDING * squared_norm(delta) ** 0.5).sum())
    if rank == 0:
        return None
    if rank < len(delta.A):
        return compress(projected, rank)[0]
    return Delta(projected.A.float(), delta.B.float(), delta.scale)


def _outside(rows: Tensor, M: Tensor) -> Tensor:
    # Twice, because M is orthonormal to fp32 alone.
    return residual(residual(rows.double(), M), M)


def squared_norm(delta: Delta | FullDelta) -> float:
    """Return ‖ΔW‖² (Frobenius) in fp64, without the dense product of a low-rank update."""
    if isinstance(delta, FullDelta):
        return float(sum(change.double().square().sum() for change in delta.parameters.values()))
    A, B = delta.A.double(), delta.B.double()
    return max(0.0, delta.scale**2 * float(((A @ A.T) * (B.T @ B)).sum()))


def squared_distance(first: Delta | FullDelta, second: Delta | FullDelta | None) -> float:
    """Return ‖ΔW_1 − ΔW_2‖² of two updates of the same kind; None stands for no update."""
    if second is None:
        return squared_norm(first)
    if isinstance(first, FullDelta) or isinstance(second, FullDelta):
        changes, others = first.changes(), second.changes()
        return float(
            sum((change.double() - others[name].double()).square().sum() for name, change in changes.items())
        )
    A = torch.cat([first.A.double(), second.A.double()])
    B = torch.cat([first.scale * first.B.double(), -second.scale * second.B.double()], dim=1)
    return squared_norm(Delta(A, B, 1.0))


def removed_energy(
    given: Deltas, taken: Deltas, part_of: Callable[[str], str]
) -> dict[str, float | dict[str, float]]:
    """Return the share of an update's energy, ‖ΔW − ΔW'‖² / ‖ΔW‖², that a projection took away.

    Args:
        given: layer name → ΔW.
        taken: layer name → ΔW'; a layer that is missing has none.
        part_of: returns the part of the model that a layer belongs to.

    Returns:
        the share over all layers as `removed`, of each part as `parts`, of each layer as `layers`.
    """
    lost = {name: squared_distance(delta, taken.get(name)) for name, delta in given.items()}
    energy = {name: squared_norm(delta) for name, delta in given.items()}
    parts: dict[str, list[str]] = {}
    for name in given:
        parts.setdefault(part_of(name), []).append(name)

    def share(names: Iterable[str]) -> float:
        names = list(names)
        total = sum(energy[name] for name in names)
        return sum(lost[name] for name in names) / total if total else 0.0

    return {
        "removed": share(given),
        "parts": {part: share(names) for part, names in parts.items()},
        "layers": {name: share([name]) for name in given},
    }
