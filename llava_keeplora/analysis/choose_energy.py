"""Choosing ε_w: the smallest principal subspace with which a model still does what it could."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from torch import nn

from llava_keeplora.analysis.svd_split import KEPT, SvdSplit

#: From the largest down; below the first at which too much is lost nothing is tried.
CANDIDATES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Choice:
    """A chosen ε_w.

    Args:
        energy: ε_w.
        directions: share of the input directions that it takes.
        score: in percent, with the principal parts of these layers alone.
        whole: of the untouched model.
    """

    energy: float
    directions: float
    score: float
    whole: float

    def to_dict(self) -> dict[str, float]:
        """As JSON values."""
        return asdict(self)


def choose_energy(layers: Mapping[str, nn.Linear], room: int, score: Callable[[], float]) -> Choice:
    """Choose the smallest energy from which on the principal parts alone keep `KEPT` of the score.

    Args:
        layers: of one part, with their whole weights; the other parts stay as they are.
        room: directions that every layer must have left beside its principal part; larger energies are no
            choice. Without any that leaves so many, the smallest is chosen.
        score: of the model as it is when called, in percent.
    """
    whole = score()
    chosen = None
    for energy in CANDIDATES:
        cuts = SvdSplit(layers, energy)
        if cuts.room < room and energy != CANDIDATES[-1]:
            continue
        with cuts.only("principal"):
            kept = score()
        if chosen is None or kept >= KEPT * whole:
            # The largest energy with room is the best there is, enough or not.
            chosen = Choice(energy, cuts.directions, kept, whole)
        if kept < KEPT * whole:
            break
    return chosen
