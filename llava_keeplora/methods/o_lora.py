"""O-LoRA: a new adapter for every task, with a penalty that pushes its A away from those of earlier tasks.

Source: Wang et al., Findings of EMNLP 2023, https://arxiv.org/abs/2310.14152.

The loss is the task's own, plus λ₁ Σ_layers Σ_{i<t} ‖A_i A_tᵀ‖₁ and λ₂ Σ_layers (‖A_t‖_F + ‖B_t‖_F). Earlier
adapters are active, frozen and merged; their A are read from the tasks' deltas. Published for LLaMA and T5: q
and v, r 8, alpha 32, dropout 0.1, λ₁ 0.5, λ₂ 0, constant learning rate 1e-3, for LLaMA 1e-4 after the first
task (here one rate for all tasks).

Differences:

- From the paper: overlaps are summed as absolute values instead of squares, and the penalty is on the matrix
  that reads the layer's input; both as in the official code.
- From the official code (https://github.com/cmnfriend/O-LoRA): dropout acts on the new adapter alone, since
  the earlier ones are part of the weights; there it acts on all. The penalty counts once per optimiser step
  however many batches are accumulated; there, without DeepSpeed, it counts once per batch.
- From the port to LLaVA in MCITlib: training passes through the earlier adapters as the evaluation does, and
  the penalty does not change them.

Legend: in / out features of a layer, r rank, R the ranks of all earlier tasks together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava_keeplora.adapters import ADAPTER, Delta, lora_layers
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import MethodInfo, TaskContext
from llava_keeplora.methods.seq_lora import SequentialLora


class OLora(SequentialLora):
    """O-LoRA as `methods/o_lora.py` describes it."""

    info = MethodInfo(
        "o-lora",
        "Orthogonal Subspace Learning for Language Model Continual Learning",
        "https://arxiv.org/abs/2310.14152",
        kept="nothing (A of every task is read from its delta)",
    )
    supports_zero3 = False

    @dataclass(frozen=True)
    class Options:
        """Settings of O-LoRA; rank and alpha are the parts'.

        Args:
            lambda1: weight of the overlaps.
            lambda2: weight of the new adapter's norms.
            dropout: share of the new adapter's input that is dropped while training.
        """

        lambda1: float = 0.5
        lambda2: float = 0.0
        dropout: float = 0.1

        def __post_init__(self) -> None:
            for name in ("lambda1", "lambda2"):
                if not getattr(self, name) >= 0.0:
                    raise MethodError(
                        f"{name} must not be negative (got {getattr(self, name)})",
                        "set it to 0 for no penalty",
                    )
            if not 0.0 <= self.dropout < 1.0:
                raise MethodError(
                    f"dropout must be in [0, 1) (got {self.dropout})",
                    "set it to 0 for no dropout",
                )

    def __init__(self, options: "OLora.Options"):
        super().__init__(options)
        self.dropout = options.dropout
        self._new: dict[str, tuple[Tensor, Tensor]] = {}
        self._earlier: dict[str, Tensor] = {}

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Hold the new adapters, and A of the earlier ones, for the loss."""
        self._new = {
            name: (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
            for name, layer in lora_layers(model).items()
        }
        deltas = ctx.deltas()
        self._earlier = {
            name: torch.cat([d[name].A for d in deltas]).to(A.device)
            for name, (A, _) in self._new.items()
            if deltas
        }
        try:
            yield
        finally:
            self._new, self._earlier = {}, {}

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """Return the task's own loss plus the penalties, which are computed in fp32 outside autocast."""
        loss = out["loss"]
        with torch.autocast(loss.device.type, enabled=False):
            for name, (A, B) in self._new.items():
                if self.options.lambda1 and name in self._earlier:
                    loss = loss + self.options.lambda1 * overlap(self._earlier[name], A)
                if self.options.lambda2:
                    loss = loss + self.options.lambda2 * (A.float().norm() + B.float().norm())
        return loss

    def finalize_deltas(self, ctx: TaskContext, deltas: Mapping[str, Delta]) -> Mapping[str, Delta]:
        """Return the adapters' deltas unchanged, and report each layer's overlap.

        The overlap grows with the rank and the number of tasks.
        """
        ctx.report["overlap"] = {
            name: float(overlap(earlier.cpu(), deltas[name].A)) for name, earlier in self._earlier.items()
        }
        return deltas


def overlap(earlier: Tensor, A: Tensor) -> Tensor:
    """Return Σ_i ‖A_i Aᵀ‖₁, the sum of the entries' absolute values.

    Args:
        earlier: the A_i stacked, (R, in).
        A: (r, in).
    """
    return (earlier.float() @ A.float().T).abs().sum()
