"""ConDU's unified model: the tasks' updates as one, from which each is decoupled by a mask and a factor.

Legend: T tasks, δ a task's change of a parameter, τ the unified change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llava_keeplora.adapters import Deltas, FullDelta

#: Bytes of a number of τ.
F32 = 4


class Unified:
    """The unified change of the tasks so far, and each task's mask and factor.

    A new task's update is unified with those of the earlier tasks, decoupled from the unified change before
    it. An entry of τ has the sign of the updates' mean, and the largest magnitude of those of that sign. A
    task's mask is where its own sign is that one; its factor λ keeps its mean magnitudes, summed over all
    parameters. The dense τ is in host memory, and a byte per entry and task for the masks.

    Source: Gao et al. 2025, arXiv 2503.10705.
    """

    def __init__(self) -> None:
        self.factors = torch.zeros(0, dtype=torch.float64)
        # By module and parameter: τ, and the masks (T, ...).
        self._changes: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.factors)

    @staticmethod
    def bytes(dense: Mapping[str, int], tasks: int) -> tuple[int, int]:
        """Return (the bytes after some tasks, more of them while one is added); see `Method.answer_bytes`."""
        masks = tasks * sum(dense.values()) // F32
        # Of one module: the tasks' changes, once more stacked, and their magnitudes without and with masks.
        return sum(dense.values()) + masks, 4 * tasks * max(dense.values(), default=0)

    def add(self, deltas: Deltas) -> None:
        """Unify the update of another task with those so far."""
        before, after = torch.zeros(2, len(self) + 1, dtype=torch.float64)
        for name in dict.fromkeys([*self._changes, *deltas]):
            new = deltas[name].changes() if name in deltas else {}
            changes = self._changes.setdefault(name, {})
            for key in dict.fromkeys([*changes, *new]):
                held = self._held(changes.get(key), new.get(key))
                unified, masks = changes[key] = unify(held)
                before += held.abs().flatten(1).mean(dim=1)
                after += (unified * masks).abs().flatten(1).mean(dim=1)
        self.factors = torch.where(after > 0, before / after, torch.ones_like(before))

    def _held(self, change: tuple[Tensor, Tensor] | None, new: Tensor | None) -> Tensor:
        """Return the changes of one parameter by the tasks so far, decoupled, and by the new one (T, ...)."""
        if change is None:
            assert new is not None
            return torch.cat([new.new_zeros(len(self), *new.shape), new[None]])
        unified, masks = change
        held = torch.stack([self.factors[task] * unified * mask for task, mask in enumerate(masks)])
        return torch.cat([held, (torch.zeros_like(unified) if new is None else new)[None]]).to(unified)

    def decoupled(self, task: int) -> Deltas:
        """Return the update of a task, 0 for the first, made as it is read: λ m ⊙ τ."""
        return _Decoupled(
            self._changes,
            lambda change: (self.factors[task] * change[0] * change[1][task]).to(change[0].dtype),
        )


class _Decoupled(Mapping[str, FullDelta]):
    """One task's changes of every module, made as they are read."""

    def __init__(
        self,
        changes: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
        decouple: Callable[[tuple[Tensor, Tensor]], Tensor],
    ):
        self._changes, self._decouple = changes, decouple

    def __getitem__(self, name: str) -> FullDelta:
        return FullDelta({key: self._decouple(change) for key, change in self._changes[name].items()})

    def __contains__(self, name: object) -> bool:
        return name in self._changes

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)


def unify(changes: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Return τ of the tasks' changes of one parameter, and their masks (T, ...).

    As in the official code, a mean of exactly 0 counts as negative.

    Args:
        changes: of each task, of the same shape.
    """
    stacked = torch.stack(list(changes))
    sign = torch.where(stacked.mean(dim=0) > 0, 1.0, -1.0).to(stacked)
    masks = stacked * sign > 0
    return sign * (stacked.abs() * masks).amax(dim=0), masks
