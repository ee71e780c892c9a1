"""Sequential LoRA with a penalty on the entries of a task's own update that earlier tasks chose.

What EWC and RegLoRA share. The penalty is a function of the dense product B A of every layer, of which one is
in memory at a time: its value and its gradients by A and B are computed together, layer by layer, and the
backward pass only multiplies them.

Legend: in / out features of a layer, r rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llava_keeplora.adapters import ADAPTER, lora_layers
from llava_keeplora.methods.base import Holding, Layer, TaskContext
from llava_keeplora.methods.seq_lora import SequentialLora


class PenalisedLora(SequentialLora):
    """Base class of methods that keep a tensor per layer and task, and penalise later updates by it."""

    supports_zero3, adopts = False, False

    def __init__(self, options: object):
        super().__init__(options)
        self._kept: dict[str, Tensor] = {}  # of all tasks together
        self._added: dict[str, Tensor] = {}  # of the last task
        self._on_device: dict[str, Tensor] = {}

    # --- what a method defines -----------------------------------------------------------------------

    def measure(self, ctx: TaskContext) -> dict[str, Tensor]:
        """Return layer name → what is kept of a finished task, on the host."""
        raise NotImplementedError

    def accumulate(self, kept: Tensor | None, added: Tensor) -> Tensor:
        """Return what is kept of all tasks, given that of the earlier ones (None if none) and of one more."""
        raise NotImplementedError

    def layer_penalty(self, product: Tensor, scale: float, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return one layer's penalty, and its gradient by the product B A (out, in)."""
        raise NotImplementedError

    def expected(self, layer: Layer, tasks: int) -> Tensor:
        """Return a tensor of the shape and type of what is kept of a layer after a number of tasks."""
        raise NotImplementedError

    def holding(self, layer: Layer) -> Holding:
        """Return the description of what is kept of one task."""
        raise NotImplementedError

    # --- the hooks -----------------------------------------------------------------------------------

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Hold what is kept of the earlier tasks on the layers' devices."""
        self._added = {}  # It is stored, and part of what is kept.
        devices = {name: layer.lora_A[ADAPTER].weight.device for name, layer in lora_layers(model).items()}
        self._on_device = {
            name: kept.to(devices[name]) for name, kept in self._kept.items() if name in devices
        }
        try:
            yield
        finally:
            self._on_device = {}

    def loss(self, ctx: TaskContext, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
        """Return the task's own loss plus the layers' penalties, which are computed outside of autocast."""
        loss, layers = out["loss"], lora_layers(ctx.model) if self._on_device else {}
        with torch.autocast(loss.device.type, enabled=False):
            for name, kept in self._on_device.items():
                layer = layers[name]
                A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                loss = loss + _Penalty.apply(A, B, float(layer.scaling[ADAPTER]), kept, self.layer_penalty)
        return loss

    def after_task(self, ctx: TaskContext) -> None:
        """Measure the finished task, and add it to what is kept."""
        self._added = self.measure(ctx) if ctx.index else {}
        self._add(self._added)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is kept of the last task."""
        return dict(self._added)

    def load_state_dicts(self, states: list[dict[str, Tensor]]) -> None:
        """Combine what is kept of all tasks, in order."""
        self._kept = {}
        for state in states:
            self._add(state)

    def _add(self, state: Mapping[str, Tensor]) -> None:
        for name, added in state.items():
            self._kept[name] = self.accumulate(self._kept.get(name), added)

    def holds(self, ctx: TaskContext, names: Collection[str]) -> dict[str, Holding]:
        """Return one tensor per layer for a task, and none for the base."""
        return {name: self.holding(layer) for name, layer in ctx.layers.items() if ctx.index}

    # --- the memory estimate -------------------------------------------------------------------------

    def planned_state(self, layers: Mapping[str, Layer], tasks: int) -> dict[str, Tensor]:
        """Return tensors like those that are kept after a number of tasks."""
        return {name: self.expected(layer, tasks) for name, layer in layers.items()} if tasks else {}


class _Penalty(torch.autograd.Function):
    """A penalty on B A as a function of A (r, in) and B (out, r)."""

    @staticmethod
    def forward(ctx, A: Tensor, B: Tensor, scale: float, kept: Tensor, penalty) -> Tensor:
        wide = torch.promote_types(A.dtype, torch.float32)
        a, b = A.to(wide), B.to(wide)
        value, slope = penalty(b @ a, scale, kept)
        ctx.save_for_backward(b.T @ slope, slope @ a.T)
        ctx.dtypes = A.dtype, B.dtype
        return value

    @staticmethod
    def backward(ctx, grad: Tensor):
        by_A, by_B = (
            (grad * slope).to(dtype) for slope, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return by_A, by_B, None, None, None
