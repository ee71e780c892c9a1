"""EWC on LoRA: weights that earlier tasks' gradients were large in are held.

Kirkpatrick et al. 2017, arXiv 1612.00796.
"""

from dataclasses import dataclass

import torch

from llava_keeplora.adapters import ADAPTER, AdapterInit, lora_layers
from llava_keeplora.methods import Holding, Method, MethodInfo

PAPER = "https://arxiv.org/abs/1612.00796"


class Fisher:
    """The diagonal of one weight's Fisher information: squared gradients, summed over the batches."""

    def __init__(self, weight):
        self.tensors = [torch.zeros(weight.shape, device=weight.device)]

    def add(self, x, dy):
        self.tensors[0] += (dy.flatten(0, -2).float().T @ x.flatten(0, -2).float()) ** 2


class EwcLora(Method):
    """A fresh adapter per task, and a penalty on where its product B A moves what earlier tasks needed."""

    info = MethodInfo("ewc-lora", "Overcoming catastrophic forgetting in neural networks", PAPER)
    supports_zero3 = False  # B A is read outside of its layer

    @dataclass(frozen=True)
    class Options:
        """The penalty's weight."""

        strength: float = 100.0

    def init_adapters(self, ctx):
        return {n: AdapterInit(layer.rank, layer.alpha, train_A=True) for n, layer in ctx.layers.items()}

    def loss(self, ctx, batch, out):
        moved = {n: layer.get_delta_weight(ADAPTER) ** 2 for n, layer in lora_layers(ctx.model).items()}
        penalty = sum((fisher.to(moved[n]) * moved[n]).sum() for n, fisher in self.sums.items())
        return out["loss"] + self.options.strength * penalty

    def after_task(self, ctx):
        self.added = {name: Fisher(layer.module.weight) for name, layer in ctx.layers.items() if ctx.index}
        if self.added:
            ctx.gradients(1.0, self.added)
        self._sum(self.state_dict())

    def state_dict(self):
        return {name: fisher.tensors[0].cpu() for name, fisher in self.added.items()}

    def load_state_dicts(self, states):
        self.sums = {}
        for state in states:
            self._sum(state)

    def _sum(self, state):
        self.sums = self.sums | {name: self.sums.get(name, 0) + fisher for name, fisher in state.items()}

    def holds(self, ctx, names):
        return {n: Holding(tuple(layer.module.weight.shape)) for n, layer in ctx.layers.items() if ctx.index}
