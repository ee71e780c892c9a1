"""NuSA-CL: every task writes into the directions in which the current weights do the least.

Source: Jo and Kim, ICLR 2026, https://arxiv.org/abs/2510.21175.

Before a task, W = U S Vᵀ is the singular value decomposition of every layer's current weight, with all
earlier updates. The first k directions reach the fraction ρ of ‖W‖²; of the others, the last r give U_n and
V_n. Then ΔW = s U_n M V_nᵀ, where only M (r × r) trains, from zero. ρ is the parts' `energy_weight`. No data
are read and nothing is kept. A layer with fewer than r directions beyond ρ gets a smaller M with the same s;
one with none is left out. Published for CLIP ViT-B/16: q, k, v and out of both encoders, r 128, s 2 / √128 =
0.177 (that is `alpha: 22.6`), ρ 0.95, dropout 0.25, AdamW, learning rate 3e-4, weight decay 0.01, warm-up
0.05, cosine, batch 16, 1000 steps per task.

Differences:

- From the paper: it was read through the authors' README and code alone, which have ρ 0.95 for all tasks; any
  other choice of ρ in the paper is not established here.
- From the official code (https://github.com/ZoYujin/NuSA-CL): its training of all methods has label smoothing
  0.2, which is left out here. Its M has r rows even where fewer directions are left; the surplus gets no
  gradient there.
- Its scale is alpha / √r with alpha 2; here it is alpha / r as in every other method, so alpha differs.
- In bf16, the bases are rounded while they train, and stored in fp32, as A is in every method.

Legend: in / out features of a layer, r rank, k principal directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava_keeplora.adapters import (
    ADAPTER,
    AdapterInit,
    Delta,
    Deltas,
    insert_between,
    lora_layers,
    merged_weight,
)
from llava_keeplora.deepspeed_zero import trained_values
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Layer, Method, MethodInfo, TaskContext
from llava_keeplora.methods.layers import in_layer
from llava_keeplora.run_folder import CAPACITY
from llava_keeplora.subspace import SpectralTail, spectral_tail


class NusaCl(Method):
    """NuSA-CL as `methods/nusa_cl.py` describes it."""

    info = MethodInfo(
        "nusa-cl",
        "Memory-Free Continual Learning with Null Space Adaptation for Zero-Shot Vision-Language Models",
        "https://arxiv.org/abs/2510.21175",
        trained="M, r × r numbers per layer",
    )

    @dataclass(frozen=True)
    class Options:
        """Settings of NuSA-CL; rank, alpha and ρ (`energy_weight`) are the parts'.

        Args:
            dropout: share of the adapter's input that is dropped while training.
        """

        dropout: float = 0.25

        def __post_init__(self) -> None:
            if not 0.0 <= self.dropout < 1.0:
                raise MethodError(
                    f"dropout must be in [0, 1) (got {self.dropout})", "set it to 0 for no dropout"
                )

    def __init__(self, options: "NusaCl.Options"):
        super().__init__(options)
        self.dropout = options.dropout
        self._between: dict[str, nn.Linear] = {}

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Check that ρ is a number.

        Raises:
            MethodError: naming the part.
        """
        for layer in layers.values():
            if "energy_weight" in layer.auto:
                raise MethodError(
                    f"parts.{layer.part}.energy_weight is 'auto', which chooses what KeepLoRA protects, but "
                    "NuSA-CL takes its directions from beyond it",
                    "set a number; the published one is 0.95",
                )

    def planned_adapters(self, layers: Mapping[str, Layer]) -> dict[str, AdapterInit]:
        """Return adapters of the largest rank that a layer may get."""
        return {name: layer.adapter(layer.largest_rank, train_B=False) for name, layer in layers.items()}

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return adapters with V_nᵀ as A and U_n as B, both frozen.

        Raises:
            MethodError: if no layer has a direction beyond ρ.
        """
        inits, left_out = {}, {}
        for name, layer in ctx.layers.items():
            tail = _tail(ctx, layer)
            rank = tail.right.shape[1]
            if not rank:
                left_out[name] = f"its {tail.principal} directions are all needed for energy_weight"
                continue
            inits[name] = layer.adapter(
                rank, tail.right.T.float().cpu(), tail.left.float().cpu(), train_B=False
            )
        if not inits:
            raise MethodError(
                f"no adapted layer has a direction left for task '{ctx.name}'", "lower energy_weight"
            )
        ctx.report["left_out"] = left_out
        return inits

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Put M between A and B of every layer, starting at zero."""
        with ExitStack() as stack:
            for name, layer in lora_layers(model).items():
                weight = layer.lora_A[ADAPTER].weight
                rank = layer.r[ADAPTER]
                M = nn.Linear(rank, rank, bias=False, device=weight.device, dtype=weight.dtype)
                nn.init.zeros_(M.weight)
                stack.enter_context(insert_between(layer, M))
                self._between[name] = M
            stack.callback(self._between.clear)
            yield

    def finalize_deltas(self, ctx: TaskContext, deltas: Mapping[str, Delta]) -> Deltas:
        """Return s (U_n M) V_nᵀ of every layer."""
        return {
            name: Delta(delta.A, delta.B @ trained_values(self._between[name].weight).cpu(), delta.scale)
            for name, delta in deltas.items()
        }

    def after_task(self, ctx: TaskContext) -> None:
        """Report how many directions of the merged weights are principal."""
        ctx.report[CAPACITY] = {
            name: layer.capacity(_tail(ctx, layer).principal).to_dict() for name, layer in ctx.layers.items()
        }


@torch.no_grad()
def _tail(ctx: TaskContext, layer: Layer) -> SpectralTail:
    """Return a layer's directions beyond ρ, of its weight as it is in this stage."""
    with in_layer(layer):
        weight: Tensor = merged_weight(layer.name, layer.module, ctx.deltas())
        return spectral_tail(weight, layer.energy_weight, layer.rank)
