"""A model whose weights are cut down to their principal part, or to what is left beside it.

Legend: W (out, in) a linear layer's weight, U (in, k) the fewest input-side principal directions with a share
of its energy; W U Uᵀ is its principal part, W - W U Uᵀ the residual one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llava_keeplora.adapters import BaseWeights, FullDelta, dense_weight
from llava_keeplora.models import Family
from llava_keeplora.models.layouts import part_of
from llava_keeplora.subspace import principal_basis, project

SIDES = ("principal", "residual")
#: Share of the whole model's score that its principal parts must keep for their energy to be enough.
KEPT = 0.95


def every_layer(family: Family) -> dict[str, dict[str, nn.Linear]]:
    """Part → name → linear layer: every one whose output the model uses."""
    found = {}
    for part in family.parts:
        linear = [
            name
            for name, module in family.model.named_modules()
            if isinstance(module, nn.Linear) and part_of(name, family.parts) == part
        ]
        leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
        unused = family.layers_without_gradient(part, leaves)
        found[part] = {
            name: layer for name, layer in family.linear_layers(part, leaves).items() if name not in unused
        }
    return found


class SvdSplit:
    """SvdSplit some layers at one share of their energy; the bases are found once and serve both sides.

    Args:
        layers: name → layer, with its whole weight.
        energy: share of each weight's energy in its principal part, in (0, 1].
    """

    def __init__(self, layers: Mapping[str, nn.Linear], energy: float):
        self._layers = layers
        self._bases = {
            name: principal_basis(dense_weight(layer), energy).basis.cpu() for name, layer in layers.items()
        }

    @property
    def directions(self) -> float:
        """The share of the input directions that hold the principal parts: Σ k / Σ in."""
        return sum(basis.shape[1] for basis in self._bases.values()) / sum(
            basis.shape[0] for basis in self._bases.values()
        )

    @property
    def room(self) -> int:
        """The fewest directions that a layer has beside its principal part."""
        return min(basis.shape[0] - basis.shape[1] for basis in self._bases.values())

    @contextmanager
    def only(self, side: str) -> Iterator[None]:
        """While inside, every layer has one side of its weight alone.

        Args:
            side: one of `SIDES`.
        """
        # A copy of the base's weight is kept of each layer on the host, from which it comes back bit for bit.
        whole = {name: BaseWeights({name: layer}) for name, layer in self._layers.items()}
        try:
            for name, layer in self._layers.items():
                removed = self._removed(side, dense_weight(layer).detach().float(), self._bases[name])
                whole[name].apply([{name: FullDelta({"weight": removed})}])
            yield
        finally:
            for weights in whole.values():
                weights.apply([])

    @staticmethod
    def _removed(side: str, weight: Tensor, basis: Tensor) -> Tensor:
        principal = project(weight, basis.to(weight))
        return principal - weight if side == "principal" else torch.neg(principal)
