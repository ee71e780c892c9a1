"""LoRA that stays quiet on what earlier tasks' layers read.

A penalty on the size of an update's answer to earlier inputs, E ‖B A x‖², by their squares alone.
"""

from dataclasses import dataclass

import torch

from llava_keeplora.adapters import ADAPTER, AdapterInit, lora_layers
from llava_keeplora.methods import Holding, Method, MethodInfo


class Squares:
    """The squares of a layer's inputs, summed over the tokens of a task, and how many tokens there were."""

    def __init__(self, layer):
        self.tensors = [torch.zeros(layer.in_features), torch.zeros(())]

    def add(self, x, mask):
        rows = x[mask] if mask is not None else x.flatten(0, -2)
        self.tensors[0] += rows.float().square().sum(0).cpu()
        self.tensors[1] += len(rows)


class QuietLora(Method):
    """A fresh adapter per task, whose product B A answers earlier tasks' inputs with little."""

    info = MethodInfo(
        "quiet-lora", "An example of a method", kept="a number per input feature of every layer"
    )
    supports_zero3 = False  # B A is read outside of its layer

    @dataclass(frozen=True)
    class Options:
        """The penalty's weight."""

        strength: float = 1.0

    def init_adapters(self, ctx):
        return {n: AdapterInit(layer.rank, layer.alpha, train_A=True) for n, layer in ctx.layers.items()}

    def loss(self, ctx, batch, out):
        moved = {n: layer.get_delta_weight(ADAPTER) ** 2 for n, layer in lora_layers(ctx.model).items()}
        answers = ((moved[n] * mean.to(moved[n])).sum() for task in self.tasks for n, mean in task.items())
        return out["loss"] + self.options.strength * sum(answers)

    def after_task(self, ctx):
        def make(groups):
            return {name: Squares(ctx.layers[name].module) for group in groups for name in group}

        squares = ctx.features(make) if ctx.index else {}
        self.added = {name: of.tensors[0] / of.tensors[1] for name, of in squares.items()}
        self.tasks = [*self.tasks, self.added]

    def state_dict(self):
        return self.added

    def load_state_dicts(self, states):
        self.tasks = list(states)

    def holds(self, ctx, names):
        return {n: Holding((layer.module.in_features,)) for n, layer in ctx.layers.items() if ctx.index}
