"""Choice of ε_w: the smallest principal subspace that keeps a model's score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from torch import nn

from llava_keeplora.analysis.svd_split import KEPT, SvdSplit

#: Values of ε_w to try, from the largest down to the first at which too much of the score is lost.
CANDIDATES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Choice:
    """A chosen ε_w.

    Args:
        energy: ε_w.
        directions: share of the input directions in the principal subspaces.
        score: score in percent with the principal parts of these layers alone.
        whole: score in percent of the unchanged model.
    """

    energy: float
    directions: float
    score: float
    whole: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields as JSON values."""
        return asdict(self)


def choose_energy(layers: Mapping[str, nn.Linear], min_free: int, score: Callable[[], float]) -> Choice:
    """Choose the smallest energy from which on the principal parts alone keep the share `KEPT` of the score.

    Args:
        layers: the layers of one part, with their complete weights; the other parts stay as they are.
        min_free: least number of directions that every layer must have outside its principal subspace, for an
            adapter; energies that leave fewer are skipped, unless all do: then the smallest is chosen.
        score: function that scores the model in its present state, in percent.
    """
    whole = score()
    chosen = None
    for energy in CANDIDATES:
        split = SvdSplit(layers, energy)
        if split.free_directions < min_free and energy != CANDIDATES[-1]:
            continue
        with split.only("principal"):
            principal_score = score()
        if chosen is None or principal_score >= KEPT * whole:
            # The first candidate is chosen even if it loses too much: larger ones leave too few directions.
            chosen = Choice(energy, split.directions, principal_score, whole)
        if principal_score < KEPT * whole:
            break
    return chosen
