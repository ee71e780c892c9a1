"""From a task's first-step gradient to directions for A.

In as few passes over the data as the answer's quality needs.

Dense, G is summed whole and its residual's singular vectors are exact. Sketched, G is never formed: one pass
gives directions and an estimate of how near they are to the best. Layers where that is short of the target
get a second pass (exact QᵀG), and where even that is short, up to two more pairs of passes (subspace
iteration). No pass takes more memory
than the first: width would buy less than passes do, see `WIDTH_PER_RANK`.

Legend: in / out features of a layer, r rank, w sketch width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from llava_keeplora.methods.base import Layer, TaskContext
from llava_keeplora.subspace import (
    DenseGradient,
    GradientSketch,
    RankError,
    ResidualDirections,
    SecondPass,
    SketchedDirections,
    sketch_width,
)

# Pairs of passes over the data at most; the answer of the last one is taken, and reported, as it is.
ROUNDS = 3

NONE = "no gradient"
NONE_OUTSIDE = "no gradient outside the protected subspace"


def gradient_statistic(
    layer: Layer, basis: Tensor, width: int | None, seed: int
) -> DenseGradient | GradientSketch:
    """Return what a layer's gradient is summed into.

    A sketch of some width, or the gradient itself where that is small too.

    Args:
        layer: the layer.
        basis: (in, k), protected.
        width: w; None for the dense form.
        seed: of the sketch.
    """
    out_dim, in_dim, device = layer.module.out_features, layer.module.in_features, layer.module.weight.device
    if width is None or not GradientSketch.is_worth_it(out_dim, in_dim, width):
        return DenseGradient(out_dim, in_dim, basis, device=device)
    return GradientSketch(out_dim, in_dim, width, basis, seed=seed, device=device)


def first_step_directions(
    ctx: TaskContext,
    ranks: Mapping[str, int],
    bases: Mapping[str, Tensor],
    fraction: float,
    sketched: bool,
    directions: Callable[..., ResidualDirections],
    naming: Callable[[Layer], AbstractContextManager],
) -> tuple[dict[str, ResidualDirections], dict[str, str]]:
    """Return directions of each layer's residual gradient.

    Args:
        ctx: the task.
        ranks: layer name → r.
        bases: layer name → (in, k), protected.
        fraction: share of the task's data.
        sketched: whether gradients are sketched where that saves memory.
        directions: statistic, basis, rank and, where there was one, second pass → the layer's directions.
        naming: names a layer in an error of the mathematics.

    Returns:
        layer name → its directions, and layer name → why it has none.
    """
    reader = _DirectionsReader(ctx, ranks, bases, directions, naming)
    statistics: dict[str, Any] = {
        name: gradient_statistic(
            ctx.layers[name], bases[name], sketch_width(rank) if sketched else None, ctx.seed
        )
        for name, rank in ranks.items()
    }
    ctx.gradients(fraction, statistics)
    reader.read(statistics)
    second: dict[str, SecondPass] = {}
    for round_ in range(ROUNDS):
        statistics = {name: statistics[name] for name in reader.insufficient()}
        if not statistics:
            break
        if round_:
            statistics = {name: statistic.refined(second.pop(name)) for name, statistic in statistics.items()}
            ctx.gradients(fraction, statistics)
        second = {name: statistic.second_pass() for name, statistic in statistics.items()}
        for statistic in statistics.values():
            statistic.forget_range()
        ctx.gradients(fraction, second)
        reader.read(statistics, second)
    return reader.directions, reader.left_out


class _DirectionsReader:
    """The directions of the layers that were read so far, each the latest, and why others have none.

    Args:
        ctx, ranks, bases, compute, naming: see `first_step_directions`.
    """

    def __init__(
        self,
        ctx: TaskContext,
        ranks: Mapping[str, int],
        bases: Mapping[str, Tensor],
        compute: Callable[..., ResidualDirections],
        naming: Callable[[Layer], AbstractContextManager],
    ):
        self.ctx, self.ranks, self.bases = ctx, ranks, bases
        self.compute, self.naming = compute, naming
        self.directions: dict[str, ResidualDirections] = {}
        self.left_out: dict[str, str] = {}

    def read(self, statistics: Mapping[str, Any], second: Mapping[str, SecondPass] | None = None) -> None:
        """Read the layers' directions from their statistics, or from finished second passes over them."""
        for name in second or statistics:
            statistic = statistics[name]
            if not second and not any(bool(tensor.any()) for tensor in statistic.tensors):
                self.left_out[name] = NONE
                continue
            more = (second[name],) if second else ()
            with self.naming(self.ctx.layers[name]):
                try:
                    self.directions[name] = self.compute(statistic, self.bases[name], self.ranks[name], *more)
                except RankError:
                    self.left_out[name] = NONE_OUTSIDE

    def insufficient(self) -> list[str]:
        """Return the layers whose directions come from a sketch and may be short of the target."""
        return [
            name
            for name, directions in self.directions.items()
            if isinstance(directions, SketchedDirections) and not directions.suffices()
        ]
