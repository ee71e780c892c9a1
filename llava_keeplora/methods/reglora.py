"""RegLoRA: later updates are kept small where earlier updates were largest.

Source: Chen et al., ICML 2025 (SEFE), https://arxiv.org/abs/2505.02486; code:
https://github.com/jinpeng0528/SEFE, read in 2026-11.

After a task, every layer's key elements are kept: the ⌊0.02 · out · in⌋ entries of |B A| that are largest.
Later tasks train with

    loss + λ · mean over the layers of the mean of |B A| at the key elements of all earlier tasks

with λ 2500. As in the authors' code, an entry that is a key element of several tasks counts once for each in
the mean, and B A is taken without the scale α / r. The paper writes a sum over the layers; the code divides
it by 224, the layers of LLaVA-7B that it adapts, and multiplies by 2500. Published for LLaVA-1.5-7B on CoIN:
all linear layers of the language model, r 128, alpha 256, one epoch, batch 128, learning rate 2e-4 with a
cosine schedule, warm-up 0.03, no weight decay; the connector is trained in full with 2e-5.

Differences from the code:

- It computes B A in the adapters' bf16, for choosing and for the penalty; here both are in fp32.
- Only layers of the language model are known to it; here all adapted layers of any part count in the mean.
- The other half of SEFE, answers rewritten in five styles, is a matter of data and not part of this method.

Indices are stored as 32-bit integers: 0.08 bytes per weight and task, 0.5 GB per task for all linear layers
of a 7B language model. In training those of all earlier tasks are in memory.

Legend: in / out features of a layer, k key elements.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_keeplora.adapters import Delta
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Holding, Layer, MethodInfo, TaskContext
from llava_keeplora.methods.penalised_lora import PenalisedLora

logger = logging.getLogger(__name__)


class RegLora(PenalisedLora):
    """RegLoRA as `methods/reglora.py` describes it."""

    info = MethodInfo(
        "reglora",
        "SEFE: Superficial and Essential Forgetting Eliminator for Multimodal Continual Instruction Tuning",
        "https://arxiv.org/abs/2505.02486",
        kept="positions of the largest entries of every layer's update, per task",
    )

    @dataclass(frozen=True)
    class Options:
        """Settings of RegLoRA; rank and alpha are the parts'.

        Args:
            strength: λ, the weight of the penalty.
            share: share of a layer's entries that are key elements of a task.
        """

        strength: float = 2500.0
        share: float = 0.02

        def __post_init__(self) -> None:
            if not self.strength >= 0.0:
                raise MethodError(
                    f"strength must not be negative (got {self.strength})", "set it to 0 for no penalty"
                )
            if not 0.0 < self.share <= 1.0:
                raise MethodError(
                    f"share must be above 0 and at most 1 (got {self.share})", "set it to 0.02, as published"
                )

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Check that the share leaves key elements to hold, and name the layers where it leaves none.

        Raises:
            MethodError: if no layer has one, since the method would be sequential LoRA.
        """
        entries = {name: m.module.out_features * m.module.in_features for name, m in layers.items()}
        without = [name for name, layer in layers.items() if not self._count(layer)]
        if not without:
            return
        if len(without) == len(entries):
            largest = max(entries, key=lambda name: entries[name])
            raise MethodError(
                f"share {self.options.share:g} leaves no key element in any layer: the largest, {largest}, "
                f"has {entries[largest]} entries",
                f"set share to at least {-(-1e6 // entries[largest]) / 1e6:g}, or to 0.02, as published",
            )
        logger.warning(
            "reglora: share %g leaves no key element in %d of %d layers, whose updates are not held: %s",
            self.options.share,
            len(without),
            len(entries),
            ", ".join(without),
        )

    def measure(self, ctx: TaskContext) -> dict[str, Tensor]:
        """Return the positions of every layer's key elements in its flattened update, in ascending order."""
        update = ctx.deltas()[-1]
        return {
            name: key_elements(update[name].dense(layer.module.weight.device), self._count(layer))
            for name, layer in ctx.layers.items()
            if isinstance(update.get(name), Delta) and self._count(layer)
        }

    def _count(self, layer: Layer) -> int:
        return int(self.options.share * layer.module.out_features * layer.module.in_features)

    def accumulate(self, kept: Tensor | None, added: Tensor) -> Tensor:
        """Return the positions of all tasks."""
        return added if kept is None else torch.cat([kept, added])

    def layer_penalty(self, product: Tensor, scale: float, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return λ / layers times the mean of |B A| at the key elements, and its gradient."""
        weight, positions = self.options.strength / len(self._on_device), kept.long()
        entries = product.flatten()[positions]
        # An entry that is a key element of several tasks gets as many equal terms, in whatever order.
        slope = torch.zeros_like(product).flatten()
        slope.index_add_(0, positions, entries.sign().mul_(weight / len(positions)))
        return weight * entries.abs().mean(), slope.view_as(product)

    def expected(self, layer: Layer, tasks: int) -> Tensor:
        """Return as many positions as that number of tasks leaves."""
        return torch.zeros(tasks * self._count(layer), dtype=torch.int32)

    def holding(self, layer: Layer) -> Holding:
        """Return a vector of positions."""
        count, entries = self._count(layer), layer.module.out_features * layer.module.in_features
        return Holding((count,), required=count > 0, integer=True, below=entries)


def key_elements(update: Tensor, count: int) -> Tensor:
    """Return the positions of the largest absolute entries of an update (out, in), as int32 on the host."""
    positions = update.abs().flatten().topk(count, sorted=False).indices
    return positions.sort().values.to("cpu", torch.int32)
