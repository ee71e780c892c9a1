"""Description of what a method keeps of a task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Holding:
    """Description of a tensor in a task's state, against which a state from elsewhere is checked.

    Args:
        shape: its dimensions: a number, None for any, or a text for any number that is the same wherever the
            text occurs.
        basis: layers whose protected subspace its columns (in, m) extend; the columns of all tasks together
            are orthonormal.
        required: whether every finished task has it.
        integer: whether it holds whole numbers.
        below: whole numbers are from 0 to below this; any when None.
    """

    shape: tuple[int | str | None, ...]
    basis: tuple[str, ...] = ()
    required: bool = True
    integer: bool = False
    below: int | None = None
