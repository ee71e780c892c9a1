"""Results of the two analyses, as plain data: what plots and tables are made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from llava_keeplora.analysis.svd_split import KEPT

#: Name of all parts of a model together, as a part.
ALL = "all parts"
#: Where an update can lie → the words for it.
PLACES = {"principal": "principal subspace", "features": "earlier tasks' features", "outside": "outside both"}


@dataclass(frozen=True)
class Point:
    """The model with one side of the weights of one part.

    Args:
        part: of the model, or `ALL`; the others keep their whole weights.
        energy: share of each weight's energy in its principal part.
        side: `principal` or `residual`, what is left of the weights.
        directions: share of the input directions that the principal parts take.
        scores: task → score in percent.
    """

    part: str
    energy: float
    side: str
    directions: float
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Knowledge:
    """What the analysis of a model found.

    Args:
        model: its name and form, as a configuration has them.
        tasks: group → task → number of examples, metric and fingerprint of the data.
        whole: task → score in percent of the untouched model.
        points: all cuts.
    """

    model: Mapping[str, object]
    tasks: Mapping[str, Mapping[str, Mapping[str, object]]]
    whole: Mapping[str, float]
    points: Sequence[Point]

    @property
    def parts(self) -> list[str]:
        """The parts that were cut, in order."""
        return list(dict.fromkeys(point.part for point in self.points))

    def mean(self, group: str, scores: Mapping[str, float]) -> float:
        """The mean score of a group's tasks."""
        return statistics.fmean(scores[task] for task in self.tasks[group])

    def line(self, part: str, side: str, group: str) -> list[tuple[float, float]]:
        """(energy, mean score of a group) along the energies."""
        return sorted(
            (p.energy, self.mean(group, p.scores)) for p in self.points if (p.part, p.side) == (part, side)
        )

    @property
    def proposals(self) -> dict[str, float | None]:
        """Part → its `proposal`."""
        return {part: self.proposal(part) for part in self.parts if part != ALL}

    def proposal(self, part: str) -> float | None:
        """ε_w from the data.

        The smallest energy from which on the principal parts alone keep the general score up to `KEPT`; None
        if none does.
        """
        enough = KEPT * self.mean("general", self.whole)
        found = None
        for energy, value in reversed(self.line(part, "principal", "general")):
            if value < enough:
                break
            found = energy
        return found

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self) | {"energy_weight": self.proposals, "kept": KEPT}


@dataclass(frozen=True)
class Update:
    """What one task did to one layer.

    Args:
        task, part, layer: their names.
        width: in.
        principal_directions, feature_directions: k, and those of earlier tasks beside them.
        energy: ‖ΔW‖².
        principal, features, outside: shares of it, which sum to 1; None for an update of zero.
    """

    task: str
    part: str
    layer: str
    width: int
    principal_directions: int
    feature_directions: int
    energy: float
    principal: float | None
    features: float | None
    outside: float | None


@dataclass(frozen=True)
class MethodUpdates:
    """All updates of one method of a run.

    Args:
        tasks: those that it has learned.
        updates: layer by layer, task by task.
        overlap: T x T mean squared cosines between the tasks' input subspaces; None with fewer than two.
    """

    tasks: Sequence[str]
    updates: Sequence[Update]
    overlap: Sequence[Sequence[float | None]] | None

    @property
    def parts(self) -> list[str]:
        """The parts of the model that were changed."""
        return list(dict.fromkeys(update.part for update in self.updates))

    def shares(self, part: str, task: str) -> dict[str, float | None]:
        """Shares of a task's update of a part by place, and `random`: what a random update would have in W_p.

        None for an update of zero.
        """
        own = [
            update
            for update in self.updates
            if (update.part, update.task) == (part, task) and update.energy > 0
        ]
        total = math.fsum(update.energy for update in own)
        if not own:
            return dict.fromkeys((*PLACES, "random"))
        shares = {
            place: math.fsum(update.energy * getattr(update, place) for update in own) / total
            for place in PLACES
        }
        return shares | {
            "random": math.fsum(update.energy * update.principal_directions / update.width for update in own)
            / total
        }

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)
