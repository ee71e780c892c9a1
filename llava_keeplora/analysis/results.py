"""Results of the two analyses, as dataclasses from which plots and tables are made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from llava_keeplora.analysis.svd_split import KEPT

#: Name of all parts of a model together, as a part.
ALL = "all parts"
#: Where an update can lie → its name in plots and tables.
PLACES = {"principal": "principal subspace", "features": "earlier tasks' features", "outside": "outside both"}


@dataclass(frozen=True)
class Point:
    """Scores of the model with one side of one part's weights alone.

    Args:
        part: part of the model, or `ALL`; the other parts keep their complete weights.
        energy: share of each weight's energy in its principal part.
        side: `principal` or `residual`, the side of the weights that is left.
        directions: share of the input directions in the principal subspaces.
        scores: task → score in percent.
    """

    part: str
    energy: float
    side: str
    directions: float
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Knowledge:
    """Result of the analysis of a model.

    Args:
        model: the section `model` of a configuration.
        tasks: group → task → number of examples, metric and fingerprint of the data.
        whole: task → score in percent of the unchanged model.
        points: scores with one side of the weights alone.
    """

    model: Mapping[str, object]
    tasks: Mapping[str, Mapping[str, Mapping[str, object]]]
    whole: Mapping[str, float]
    points: Sequence[Point]

    @property
    def parts(self) -> list[str]:
        """Parts of the model that were analysed, in order."""
        return list(dict.fromkeys(point.part for point in self.points))

    def mean(self, group: str, scores: Mapping[str, float]) -> float:
        """Return the mean score of a group's tasks."""
        return statistics.fmean(scores[task] for task in self.tasks[group])

    def line(self, part: str, side: str, group: str) -> list[tuple[float, float]]:
        """Return pairs (energy, mean score of a group), in order of energy."""
        return sorted(
            (p.energy, self.mean(group, p.scores)) for p in self.points if (p.part, p.side) == (part, side)
        )

    @property
    def proposals(self) -> dict[str, float | None]:
        """Proposed ε_w of every part, see `proposal`."""
        return {part: self.proposal(part) for part in self.parts if part != ALL}

    def proposal(self, part: str) -> float | None:
        """Return the ε_w of a part that the scores propose.

        This is the smallest energy from which on the principal parts alone keep the share `KEPT` of the
        general score; None if no energy does.
        """
        enough = KEPT * self.mean("general", self.whole)
        smallest = None
        for energy, value in reversed(self.line(part, "principal", "general")):
            if value < enough:
                break
            smallest = energy
        return smallest

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON values, with the proposals."""
        return asdict(self) | {"energy_weight": self.proposals, "kept": KEPT}


@dataclass(frozen=True)
class Update:
    """One task's update of one layer.

    Args:
        task, part, layer: their names.
        width: in, the layer's input width.
        principal_directions: k, the number of principal directions.
        feature_directions: the number of earlier tasks' feature directions outside the principal subspace.
        energy: ‖ΔW‖².
        principal, features, outside: shares of the energy, which sum to 1; None for an update of zero.
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
        tasks: names of the tasks that it has learned.
        updates: the updates, layer by layer, then task by task.
        overlap: mean squared cosines (T, T) between the tasks' input subspaces; None with fewer than two.
    """

    tasks: Sequence[str]
    updates: Sequence[Update]
    overlap: Sequence[Sequence[float | None]] | None

    @property
    def parts(self) -> list[str]:
        """Parts of the model that were changed."""
        return list(dict.fromkeys(update.part for update in self.updates))

    def shares(self, part: str, task: str) -> dict[str, float | None]:
        """Return the shares of a task's update of a part: each of `PLACES`, and `random`.

        `random` is the share that a random update would have in the principal subspace, k / in. All values
        are None for an update of zero.
        """
        changed = [
            update
            for update in self.updates
            if (update.part, update.task) == (part, task) and update.energy > 0
        ]
        total = math.fsum(update.energy for update in changed)
        if not changed:
            return dict.fromkeys((*PLACES, "random"))
        shares = {
            place: math.fsum(update.energy * getattr(update, place) for update in changed) / total
            for place in PLACES
        }
        at_random = math.fsum(
            update.energy * update.principal_directions / update.width for update in changed
        )
        return shares | {"random": at_random / total}

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON values."""
        return asdict(self)
