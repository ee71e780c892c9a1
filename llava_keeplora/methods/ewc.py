"""EWC: elastic weight consolidation, on the updates of LoRA adapters.

Source: Kirkpatrick et al., PNAS 2017, https://arxiv.org/abs/1612.00796.

After a task, the diagonal of the Fisher information is estimated for every adapted weight W:

    F = mean over the task's examples of (∂ log p(answer) / ∂W)², entry by entry

and later tasks train with loss + λ/2 Σ_weights Σ_{earlier tasks} F ∘ (ΔW)², where ΔW = s B A is the change of
the weight by the task that is being trained. log p of an answer of several tokens is the sum over its tokens.

Differences from the paper:

- The paper holds every weight of the network near its values after each earlier task, one penalty per task.
  Here the weights that adapters change are held, near their values at the task's start, with the sum of the
  earlier tasks' F (as Huszár, PNAS 2018, https://arxiv.org/abs/1712.03847, derives it; also known as online
  EWC without decay). Modules that are trained in full are free.
- F takes the given answers (the empirical Fisher), not answers drawn from the model.
- The paper gives λ for its own networks alone; the default here is not a published value.

F is as large as the weight that it belongs to: for all linear layers of a 7B language model 26 GB in fp32, 13
GB in bf16. It is summed in fp32 over the pass, stored in fp32 for weights in fp32 and in bf16 for others (an
estimate from examples has larger errors), once per task in the run folder, and their sum is in memory in
training. The pass takes one example at a time, since squares of a batch's mean gradient are no squares of the
examples' gradients; `fisher_fraction` makes it shorter. A layer that a single example passes through twice
counts both passages separately.

Legend: in / out features of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Holding, Layer, MethodInfo, TaskContext
from llava_keeplora.methods.penalised_lora import PenalisedLora
from llava_keeplora.run_folder import Stage


class SquaredGradient:
    """Sum of a weight's squared gradients, one per example; a statistic of the gradient pass.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: Layer):
        weight, shape = layer.module.weight, (layer.module.out_features, layer.module.in_features)
        self.tensors = [torch.zeros(shape, dtype=_wide(weight.dtype), device=weight.device)]

    def add(self, x: Tensor, dy: Tensor) -> None:
        """Add the squares of dYᵀX of one example's input x (..., in) and output gradient dy (..., out)."""
        (total,) = self.tensors
        gradient = dy.reshape(-1, dy.shape[-1]).to(total.dtype).T @ x.reshape(-1, x.shape[-1]).to(total.dtype)
        total.addcmul_(gradient, gradient)


class Ewc(PenalisedLora):
    """EWC as `methods/ewc.py` describes it."""

    info = MethodInfo(
        "ewc",
        "Overcoming catastrophic forgetting in neural networks",
        "https://arxiv.org/abs/1612.00796",
        kept="the Fisher diagonal of every adapted weight, as large as the weight, per task",
    )
    stage_cost = {Stage.CONSOLIDATED: 3.0}

    @dataclass(frozen=True)
    class Options:
        """Settings of EWC; rank and alpha are the parts'.

        Args:
            strength: λ, the weight of the penalty.
            fisher_fraction: fraction of the task's data from which F is estimated, evenly spaced.
        """

        strength: float = 100.0
        fisher_fraction: float = 1.0

        def __post_init__(self) -> None:
            if not self.strength >= 0.0:
                raise MethodError(
                    f"strength must not be negative (got {self.strength})", "set it to 0 for no penalty"
                )
            if not 0.0 < self.fisher_fraction <= 1.0:
                raise MethodError(
                    f"fisher_fraction must be above 0 and at most 1 (got {self.fisher_fraction})",
                    "set it to 1 to use all examples",
                )

    def measure(self, ctx: TaskContext) -> dict[str, Tensor]:
        """Return every layer's F on the merged model."""
        statistics = self.gradient_statistics(ctx.layers)
        count = ctx.gradients(self.options.fisher_fraction, statistics, per_example=True)
        return {
            name: (statistic.tensors[0] / count).to("cpu", _stored(ctx.layers[name]))
            for name, statistic in statistics.items()
        }

    def gradient_statistics(self, layers: Mapping[str, Layer]) -> dict[str, SquaredGradient]:
        """Return layer name → the statistic that sums its squared gradients."""
        return {name: SquaredGradient(layer) for name, layer in layers.items()}

    def accumulate(self, kept: Tensor | None, added: Tensor) -> Tensor:
        """Return the sum, rounded to the type in which F is stored."""
        if kept is None:
            return added
        wide = _wide(added.dtype)
        return (kept.to(wide) + added.to(wide)).to(added.dtype)

    def layer_penalty(self, product: Tensor, scale: float, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return λ/2 Σ F ∘ (s B A)² and λ s² F ∘ B A."""
        slope = product.mul(kept).mul_(self.options.strength * scale**2)
        return 0.5 * product.mul_(slope).sum(), slope

    def expected(self, layer: Layer, tasks: int) -> Tensor:
        """Return zeros like F, whatever the number of tasks."""
        return torch.zeros(layer.module.out_features, layer.module.in_features, dtype=_stored(layer))

    def holding(self, layer: Layer) -> Holding:
        """Return the weight's shape."""
        return Holding((layer.module.out_features, layer.module.in_features))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which squares of gradients are summed."""
    return dtype if dtype == torch.float64 else torch.float32


def _stored(layer: Layer) -> torch.dtype:
    """Return the type in which a layer's F is stored; fp16 has too small a range."""
    dtype = layer.module.weight.dtype
    return dtype if dtype in (torch.float32, torch.float64) else torch.bfloat16
