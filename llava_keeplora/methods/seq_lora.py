"""Sequential LoRA: a fresh adapter for every task, trained by the task's loss and merged; nothing is protected."""

from __future__ import annotations

from dataclasses import dataclass

from llava_keeplora.adapters import AdapterInit
from llava_keeplora.methods.base import Method, Record, TaskContext


class SequentialLora(Method):
    """The *merge and fresh* variant: A starts Kaiming-uniform, B at zero, both train (Hu et al. 2021)."""

    record = Record("seq-lora", "LoRA: Low-Rank Adaptation of Large Language Models", "https://arxiv.org/abs/2106.09685")

    @dataclass(frozen=True)
    class Options:
        """No settings of its own; rank and alpha are the parts'."""

    def prepare(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """A fresh adapter on every layer."""
        return {name: AdapterInit(layer.rank, layer.alpha, train_A=True) for name, layer in ctx.layers.items()}
