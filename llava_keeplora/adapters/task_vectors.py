"""Merging of task vectors: the updates of tasks that were each trained from the same base.

Legend: T tasks, n entries of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llava_keeplora.adapters.deltas import Delta, Deltas, FullDelta


class MergedDeltas(Mapping[str, FullDelta]):
    """Deltas that are merged when they are read, so that one module's dense changes are in memory at a time.

    Args:
        tasks: each task's deltas; a module without one has a change of 0 there.
        rule: changes of one parameter by the tasks that have one, each of the same shape → the merged one.
    """

    def __init__(self, tasks: Sequence[Deltas], rule: Callable[[list[Tensor]], Tensor]):
        self._tasks, self._rule = tasks, rule

    def __getitem__(self, name: str) -> FullDelta:
        changes = [task[name].changes() for task in self._tasks if name in task]
        if not changes:
            raise KeyError(name)
        parameters = dict.fromkeys(key for change in changes for key in change)
        return FullDelta(
            {key: self._rule([change[key] for change in changes if key in change]) for key in parameters}
        )

    def __contains__(self, name: object) -> bool:
        return any(name in task for task in self._tasks)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for task in self._tasks for name in task))

    def __len__(self) -> int:
        return len(list(iter(self)))


def scale_deltas(deltas: Deltas, factor: float) -> dict[str, Delta | FullDelta]:
    """Return deltas multiplied by a number; those of low rank keep their rank."""
    return {
        name: Delta(delta.A, delta.B, factor * delta.scale)
        if isinstance(delta, Delta)
        else FullDelta({key: factor * change for key, change in delta.parameters.items()})
        for name, delta in deltas.items()
    }


def ties(changes: Sequence[Tensor], density: float) -> Tensor:
    """Return the TIES merge of the tasks' changes of one parameter.

    Of each change only the entries of largest magnitude are kept (trim). Each entry's sign is that of the sum
    of what is kept (elect), and its value the mean of the kept values of that sign (disjoint mean); 0 where
    there is none.

    Source: Yadav et al. 2023, arXiv 2306.01708, algorithm 1 with λ = 1.

    Args:
        changes: of each task.
        density: the share of a change's entries that is kept, in (0, 1].
    """
    kept = torch.stack([_trim(change, density) for change in changes])
    agreeing = kept * (kept * kept.sum(dim=0).sign() > 0)
    return agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)


def _trim(change: Tensor, density: float) -> Tensor:
    """Return a change with all but the largest entries set to 0; of equal ones at the border all stay."""
    count = max(round(density * change.numel()), 1)
    smallest = change.abs().flatten().kthvalue(change.numel() - count + 1).values
    return change * (change.abs() >= smallest)
