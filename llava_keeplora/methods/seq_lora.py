"""Sequential LoRA: a new adapter for every task, trained by the task's loss and merged; nothing is protected.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, for a single task.

A starts Kaiming-uniform and B at zero, both are trained, and s B A is added to the weights. Published for
sequences (MCITlib, LLaVA): all linear layers of the language model, r 16 or 32, alpha 2 r, dropout 0.05.

Differences from MCITlib's LoRA-FT: it continues training one adapter (*continue*); here every task has a new
one on the merged weights (*merge and fresh*), as with every other method. There is no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_keeplora.adapters import AdapterInit
from llava_keeplora.methods.base import Method, MethodInfo, TaskContext


class SequentialLora(Method):
    """Sequential LoRA as `methods/seq_lora.py` describes it."""

    info = MethodInfo(
        "seq-lora", "LoRA: Low-Rank Adaptation of Large Language Models", "https://arxiv.org/abs/2106.09685"
    )

    adopts = True

    @dataclass(frozen=True)
    class Options:
        """No settings of its own; rank and alpha are the parts'."""

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return a new adapter for every layer."""
        return {
            name: AdapterInit(layer.rank, layer.alpha, train_A=True) for name, layer in ctx.layers.items()
        }
