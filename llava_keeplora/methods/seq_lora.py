"""Sequential LoRA: a fresh adapter for every task, trained by the task's loss and merged.

Nothing is protected (arXiv 2106.09685).

A starts Kaiming-uniform and B at zero, both train, and s B A is added to the weights (Hu et al. 2021); LoRA's
paper has one task. Published for sequences (MCITlib, LLaVA): all linear layers of the language model, r 16 or
32, alpha 2 r, dropout 0.05.

Where this differs from MCITlib's LoRA-FT: that goes on training one adapter (*continue*), here every task has
a fresh one on the merged weights (*merge and fresh*), as every other method of the table does; and there is
no dropout.
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

    @dataclass(frozen=True)
    class Options:
        """No settings of its own; rank and alpha are the parts'."""

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """A fresh adapter on every layer."""
        return {
            name: AdapterInit(layer.rank, layer.alpha, train_A=True) for name, layer in ctx.layers.items()
        }
