"""A layer that methods adapt, with its part's settings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from llava_keeplora.adapters import AdapterInit
from llava_keeplora.run_folder import Capacity


@dataclass(frozen=True)
class Layer:
    """An adapted linear layer and its part's settings.

    Args:
        name: full module name.
        part: the part of the model: `vision`, `text`, ...
        module: the linear layer with its current weights.
        rank, alpha, energy_weight, energy_feature: see `PartConfig`; for a threshold that is `auto`, its
            upper bound.
        auto: names of the thresholds that are `auto`.
    """

    name: str
    part: str
    module: nn.Linear
    rank: int
    alpha: float
    energy_weight: float
    energy_feature: float
    auto: tuple[str, ...] = ()

    @property
    def largest_rank(self) -> int:
        """The rank of the largest adapter that the layer may get."""
        return min(self.rank, self.module.in_features, self.module.out_features)

    def adapter(
        self, rank: int, A: Tensor | None = None, B: Tensor | None = None, **trained: bool
    ) -> AdapterInit:
        """Return an adapter of some rank for the layer, with the same scale alpha / rank.

        Args:
            rank, A, B, trained: see `AdapterInit`.
        """
        return AdapterInit(rank, self.alpha / self.rank * rank, A, B, **trained)

    def capacity(self, protected: int) -> Capacity:
        """Return the layer's capacity with a number of protected directions."""
        return Capacity(self.module.in_features, protected, self.part)
