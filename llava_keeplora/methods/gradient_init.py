"""Initial directions of A from a task's first-step gradient, in as few passes over the data as needed.

Dense, G is summed in full and its residual's singular vectors are exact. Sketched, G is never formed: one
pass gives directions and an estimate of how near they are to the best ones. Layers that fall short of the
target get a second pass (exact QᵀG), and if that still falls short, up to two more pairs of passes (subspace
iteration). No pass takes more memory than the first: a wider sketch would gain less than more passes do, see
`WIDTH_PER_RANK`.

Legend: in / out features of a layer, r rank, w sketch width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from llava_keeplora.methods.base import Layer, TaskContext
from llava_keeplora.methods.shares import read_gradients
from llava_keeplora.subspace import (
    DenseGradient,
    GradientSketch,
    RankError,
    ResidualDirections,
    SecondPass,
    SketchedDirections,
    residual,
    sketch_width,
)

# The most pairs of passes over the data; the result of the last one is used, and its quality reported.
ROUNDS = 3

NONE = "no gradient"
NONE_OUTSIDE = "no gradient outside the protected subspace"


def gradient_statistic(
    layer: Layer, basis: Tensor, width: int | None, seed: int
) -> DenseGradient | GradientSketch:
    """Return the statistic that sums a layer's gradient: a sketch, or the whole gradient of a small layer.

    Args:
        layer: the layer.
        basis: (in, k), the protected subspace.
        width: w; None for the dense form.
        seed: seed of the sketch.
    """
    out_dim, in_dim, device = layer.module.out_features, layer.module.in_features, layer.module.weight.device
    if width is None or not GradientSketch.is_worth_it(out_dim, in_dim, width):
        return DenseGradient(out_dim, in_dim, basis, device=device)
    return GradientSketch(out_dim, in_dim, width, basis, seed=seed, device=device)


def first_step_directions(
    ctx: TaskContext,
    ranks: Mapping[str, int],
    bases: Mapping[str, Tensor],
    fraction: float | str,
    sketched: bool,
    directions: Callable[..., ResidualDirections],
    naming: Callable[[Layer], AbstractContextManager],
) -> tuple[dict[str, ResidualDirections], dict[str, str]]:
    """Return the leading directions of each layer's residual gradient.

    Args:
        ctx: the task's context.
        ranks: layer name → r.
        bases: layer name → (in, k), the protected subspace.
        fraction: fraction of the task's data, or `auto`, see `shares`.
        sketched: whether gradients are sketched where that saves memory.
        directions: (statistic, basis, rank and, if there was one, second pass) → the layer's directions.
        naming: returns a context that adds the layer's name to errors raised inside it.

    Returns:
        layer name → its directions, and layer name → why it has none; no data are read for no layer.
    """
    if not ranks:
        return {}, {}
    reader = _DirectionsReader(ctx, ranks, bases, directions, naming)
    statistics: dict[str, Any] = {
        name: gradient_statistic(
            ctx.layers[name], bases[name], sketch_width(rank) if sketched else None, ctx.seed
        )
        for name, rank in ranks.items()
    }
    share = read_gradients(ctx, statistics, ranks, fraction, naming)
    reader.read(statistics)
    second: dict[str, SecondPass] = {}
    for round_ in range(ROUNDS):
        statistics = {name: statistics[name] for name in reader.insufficient()}
        if not statistics:
            break
        if round_:
            statistics = {name: statistic.refined(second.pop(name)) for name, statistic in statistics.items()}
            ctx.gradients(share, statistics)
        second = {name: statistic.second_pass() for name, statistic in statistics.items()}
        for statistic in statistics.values():
            statistic.forget_range()
        ctx.gradients(share, second)
        reader.read(statistics, second)
    return reader.directions, reader.left_out


class _DirectionsReader:
    """The latest directions of every layer read so far, and why other layers have none.

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
        """Compute the layers' directions from their statistics, or from finished second passes."""
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
        """Return the layers whose directions come from a sketch and may fall short of the target."""
        return [
            name
            for name, directions in self.directions.items()
            if isinstance(directions, SketchedDirections) and not directions.suffices()
        ]


def random_directions(rank: int, basis: Tensor, generator: torch.Generator) -> Tensor:
    """Return random orthonormal directions (rank, in) outside the basis (in, k)."""
    width = basis.shape[0]
    draw = residual(torch.randn(rank, width, generator=generator, dtype=torch.float64), basis.double())
    return torch.linalg.qr(residual(draw, basis.double()).T).Q.T.float()
