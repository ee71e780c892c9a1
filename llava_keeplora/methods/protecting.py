"""What methods share that keep a basis of protected input directions for every layer.

Legend: in features of a layer, k protected directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_keeplora.methods.base import Layer, Method, TaskContext
from llava_keeplora.run_folder import CAPACITY
from llava_keeplora.subspace import empty_basis


class ProtectingMethod(Method):
    """Base class of methods with a protected subspace per layer.

    Attributes:
        bases: layer name → its basis (in, k), as far as it has one.
    """

    def __init__(self, options: Any):
        super().__init__(options)
        self.bases: dict[str, Tensor] = {}
        self._added: dict[str, Tensor] = {}

    def basis(self, layer: Layer) -> Tensor:
        """Return a layer's basis (in, k), without columns if nothing is protected."""
        return self.bases.get(layer.name, empty_basis(layer.module.in_features))

    def append_columns(self, name: str, columns: Tensor) -> None:
        """Append columns that a task's state holds to a layer's basis, as they are."""
        self.bases[name] = torch.cat([self.bases[name], columns], dim=1) if name in self.bases else columns

    def report_capacity(self, ctx: TaskContext) -> None:
        """Report every layer's capacity with the bases as they are."""
        ctx.report[CAPACITY] = {
            name: layer.capacity(self.basis(layer).shape[1]).to_dict() for name, layer in ctx.layers.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the last `after_task` added; by default the new columns of the bases."""
        return dict(self._added)

    def capacity(self) -> dict[str, int]:
        """Return layer name → k."""
        return {name: basis.shape[1] for name, basis in self.bases.items()}
