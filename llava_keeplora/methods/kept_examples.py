"""Training examples that a method keeps of every task, by id."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from llava_keeplora.methods.base import Holding, TaskContext
from llava_keeplora.run_folder import EXAMPLES

NONE = torch.empty(0, dtype=torch.long)


class KeptExamples:
    """The examples that are kept of the general data and of each task, as the numbers of their ids.

    Args:
        key: name of the tensor in a task's state.
    """

    def __init__(self, key: str):
        self.key = key
        #: Numbers of the examples of the general data and of each task; see `_number`.
        self._numbers: list[Tensor] = []

    def keep(self, ctx: TaskContext, count: int) -> None:
        """Draw the examples that are kept of a task, by the stage's seed, and report their ids and bytes.

        Args:
            ctx: the task's context; with `ctx.index` 0 the general data's.
            count: how many, at most all; with 0 no data are read.
        """
        if not count:
            self._numbers = [*self._numbers[: ctx.index], NONE]
            return
        assert ctx.data is not None
        data = ctx.data(ctx.index)
        # By id, so that the order of the files does not matter.
        rows = {name: row for row, name in enumerate(data.ids)}
        ids = sorted(random.Random(ctx.seed).sample(sorted(rows), count))
        numbers = torch.tensor([_number(name) for name in ids], dtype=torch.long)
        self._numbers = [*self._numbers[: ctx.index], numbers]
        ctx.report[EXAMPLES] = {"ids": ids, "bytes": data.stored_bytes(rows[name] for name in ids)}

    def rows(self, ctx: TaskContext, source: int) -> list[int]:
        """Return the positions of what is kept of a task, or for 0 of the general data, in its data."""
        kept = set(self._numbers[source].tolist())
        if not kept:
            return []
        assert ctx.data is not None
        return [row for row, name in enumerate(ctx.data(source).ids) if _number(name) in kept]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the numbers of the examples that are kept of the last task."""
        return {self.key: self._numbers[-1]} if self._numbers and len(self._numbers[-1]) else {}

    def load(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Take over what is kept of the general data and of every task."""
        self._numbers = [state.get(self.key, NONE) for state in states]

    def holds(self, index: int) -> dict[str, Holding]:
        """Return the numbers of the examples that are kept of a task."""
        return {self.key: Holding((None,), required=index > 0, integer=True)}


def _number(name: str) -> int:
    """Return the first 64 bits of the SHA-256 of an example's id."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
