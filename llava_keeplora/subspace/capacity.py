"""How long a layer's protected subspace leaves room for more tasks.

Shapes: in = the layer's input width, k = protected directions, r = rank of a task's update.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Room:
    """What is left of one layer's input space.

    Args:
        left: in - k directions outside the protected subspace.
        growth: directions that a task has added on average.
        tasks: how many more tasks find r directions, if each adds as many; None where nothing grows.
    """

    left: int
    growth: float
    tasks: int | None

    def to_dict(self) -> dict[str, float | int | None]:
        """As JSON values."""
        return asdict(self)


def room_left(width: int, sizes: Sequence[int], rank: int) -> Room:
    """The room of a layer, and for how many more tasks it lasts.

    A task needs r directions when it begins: the n-th from now finds in - k - (n - 1) g of them, g the mean
    growth so far. The energy rule counts what is protected already, so later tasks tend to add less, and g
    errs on the side of caution.

    Args:
        width: in.
        sizes: k before the first task, then after each one, at least two numbers.
        rank: r.
    """
    left, growth = width - sizes[-1], (sizes[-1] - sizes[0]) / (len(sizes) - 1)
    if left < rank:
        return Room(left, growth, 0)
    return Room(left, growth, math.floor((left - rank) / growth) + 1 if growth > 0 else None)
