"""Data beside the tasks': pictures and texts that a method looks at while it trains, without labels."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """Pictures, and texts that need not belong to them.

    Args:
        images: indices → what the model takes for these pictures.
        count: how many pictures there are.
        texts: what the text encoder takes of them, each (texts, tokens).
        record: what tells them from others, for the journal.
    """

    images: Callable[[Sequence[int]], list[dict[str, Tensor]]]
    count: int
    texts: Mapping[str, Tensor]
    record: Mapping[str, Any]

    def draw(self, size: int, *seed: int) -> list[int]:
        """Indices of some pictures, none twice.

        A pure function of the arguments, which no other generator feels.
        """
        return random.Random("/".join(map(str, seed))).sample(range(self.count), min(size, self.count))
