"""Split of a model's weights into their principal and residual parts.

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
#: Share of the unchanged model's score that the principal parts alone must keep.
KEPT = 0.95


def every_layer(family: Family) -> dict[str, dict[str, nn.Linear]]:
    """Return part → name → linear layer, for all linear layers whose output the model uses."""
    layers = {}
    for part in family.parts:
        linear = [
            name
            for name, module in family.model.named_modules()
            if isinstance(module, nn.Linear) and part_of(name, family.parts) == part
        ]
        leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
        unused = family.layers_without_gradient(part, leaves)
        layers[part] = {
            name: layer for name, layer in family.linear_layers(part, leaves).items() if name not in unused
        }
    return layers


class SvdSplit:
    """Split of some layers at one share of their energy; both sides use the same bases.

    Args:
        layers: name → layer, with its complete weight.
        energy: share of each weight's energy in its principal part, in (0, 1].
    """

    def __init__(self, layers: Mapping[str, nn.Linear], energy: float):
        self._layers = layers
        self._bases = {
            name: principal_basis(dense_weight(layer), energy).basis.cpu() for name, layer in layers.items()
        }

    @property
    def directions(self) -> float:
        """Share of the input directions in the principal subspaces, Σ k / Σ in."""
        return sum(basis.shape[1] for basis in self._bases.values()) / sum(
            basis.shape[0] for basis in self._bases.values()
        )

    @property
    def free_directions(self) -> int:
        """Fewest directions that a layer has outside its principal subspace, min (in − k)."""
        return min(basis.shape[0] - basis.shape[1] for basis in self._bases.values())

    @contextmanager
    def only(self, side: str) -> Iterator[None]:
        """Reduce every layer to one side of its weight for the length of a block.

        Args:
            side: one of `SIDES`.
        """
        # `BaseWeights` keeps a copy of each weight on the host, and restores it bit for bit.
        originals = {name: BaseWeights({name: layer}) for name, layer in self._layers.items()}
        try:
            for name, layer in self._layers.items():
                change = self._change(side, dense_weight(layer).detach().float(), self._bases[name])
                originals[name].apply([{name: FullDelta({"weight": change})}])
            yield
        finally:
            for weights in originals.values():
                weights.apply([])

    @staticmethod
    def _change(side: str, weight: Tensor, basis: Tensor) -> Tensor:
        """Return what to add to a weight (out, in) so that one side of it is left."""
        principal = project(weight, basis.to(weight))
        return principal - weight if side == "principal" else torch.neg(principal)
