"""The model as it was at a task's start, as a teacher while the task trains; no copy of it is needed.

Adapters add nothing while it answers, and modules that are trained in full get their initial values back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from llava_keeplora.adapters import ADAPTER, lora_layers
from llava_keeplora.capture import evaluating
from llava_keeplora.deepspeed_zero import gathered
from llava_keeplora.methods.base import TaskContext


class TaskStart:
    """The model at the start of the task that is being trained.

    Args:
        model: the model with its adapters, before the first step; B is zero.
    """

    def __init__(self, model: nn.Module):
        self._model, self._adapters = model, lora_layers(model)
        prefixes = tuple(f"{name}." for name in self._adapters)
        self._full = [
            p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(prefixes)
        ]
        with gathered(self._full):
            self._values = [p.detach().clone() for p in self._full]
        self._kept: Tensor | None = None

    def keep(self, ctx: TaskContext, compute: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        """Compute once what `output` then looks up, for every example of the task; in `before_steps`.

        Args:
            ctx: the task's context.
            compute: batch → a row per example, of the model that is being trained.
        """
        with self.restored():
            self._kept = ctx.outputs(compute)

    def output(
        self, ctx: TaskContext, batch: Mapping[str, Tensor], compute: Callable[[Mapping[str, Tensor]], Tensor]
    ) -> Tensor:
        """Return what `compute` gives for a batch at the task's start; in `loss`. See `keep`."""
        if self._kept is not None:
            return self._kept[ctx.rows.cpu()].to(ctx.rows.device)
        with self.restored():
            return compute(batch)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the model into evaluation mode and that state for a forward pass, without gradients."""
        scales = {name: layer.scaling[ADAPTER] for name, layer in self._adapters.items()}
        now = self._exchange(self._values)
        for layer in self._adapters.values():
            layer.scaling[ADAPTER] = 0.0
        try:
            with evaluating(self._model), torch.no_grad():
                yield
        finally:
            for name, layer in self._adapters.items():
                layer.scaling[ADAPTER] = scales[name]
            self._exchange(now)

    @torch.no_grad()
    def _exchange(self, values: list[Tensor]) -> list[Tensor]:
        """Set the modules that are trained in full to some values, and return the ones they had."""
        with gathered(self._full, write=True):
            before = [p.detach().clone() for p in self._full]
            for p, value in zip(self._full, values, strict=True):
                # By `data`: the graph of this step's own forward pass is still to be used, with the weights
                # that are put back before it is.
                p.data.copy_(value)
        return before


@contextmanager
def remember_start(method: Any, model: nn.Module) -> Iterator[None]:
    """Give a method the model at the task's start as its `start`, in `Method.training_context`."""
    method.start = TaskStart(model)
    try:
        yield
    finally:
        method.start = None


def divergence(P: Tensor, Q: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(softmax(P / τ) ‖ softmax(Q / τ)), the mean over the rows, in fp32 or higher precision.

    Args:
        P: (rows, columns), logits of the teacher.
        Q: (rows, columns), logits of the student.
        temperature: τ.
    """
    P, Q = (logits.float() if logits.dtype.itemsize < 4 else logits for logits in (P, Q))
    p, q = ((logits / temperature).log_softmax(dim=1) for logits in (P, Q))
    return kl_div(q, p, reduction="batchmean", log_target=True)
