"""Forecast of how many more tasks a layer's input space has room for.

Shapes: in = the layer's input width, k = protected directions, r = rank of a task's update.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Room:
    """The unprotected part of one layer's input space.

    Args:
        left: in - k, the directions outside the protected subspace.
        growth: directions that a task has added on average.
        tasks: how many more tasks find r free directions, if each adds `growth`; None if that is 0.
    """

    left: int
    growth: float
    tasks: int | None

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the fields as JSON values."""
        return asdict(self)


def room_left(width: int, sizes: Sequence[int], rank: int) -> Room:
    """Return a layer's free directions, and for how many more tasks they last.

    A task needs r free directions when it starts: the n-th from now finds in - k - (n - 1) g of them, with g
    the mean growth so far. As the energy rule counts what is protected already, later tasks tend to add less,
    so g rather overestimates.

    Args:
        width: in.
        sizes: k before the first task and after each task, at least two numbers.
        rank: r.
    """
    left, growth = width - sizes[-1], (sizes[-1] - sizes[0]) / (len(sizes) - 1)
    if left < rank:
        return Room(left, growth, 0)
    return Room(left, growth, math.floor((left - rank) / growth) + 1 if growth > 0 else None)
