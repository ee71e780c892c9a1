"""SD-LoRA: every task adds a direction, and the magnitudes of all directions stay trainable.

Source: Wu et al., ICLR 2025, https://arxiv.org/abs/2501.13198, equation 4.

W_t = W_0 + Σ_{k≤t} α_k N_k. While task t trains, N_t = s B_t A_t and all α change; the N_k of earlier tasks
are frozen. Each magnitude is one number for all layers, as in the paper. The delta of task t is its own
direction and, exactly and as low-rank terms, the changes of the others: α_t s B_t A_t + Σ_{k<t} (Δα_k) N_k.
So the model after any task is still the base plus a list of deltas, and N_k is read from the first r rows of
task k's delta. Published for ViT-B/16: q and v, r 10, Adam, learning rate 0.008, batch 128.

Differences:

- From the paper: a direction is not scaled to ‖N_k‖_F = 1 but frozen with the norm that it has in each layer
  at its task's end, and α_k continues from 1 there. The paper's form is 0/0 at B = 0. The span and the number
  of trained magnitudes are the same, and no task starts with a jump. The variants with decreasing ranks (RR)
  and with merged directions (KD) are not implemented.
- From the official code (https://github.com/WuYichen-97/SD-Lora-CL): it divides by ‖B_k‖_F ‖A_k‖_F, replaces
  the learned magnitudes by 0.8 at every task's start, and supports 20 earlier tasks; there task t + 1 does
  not start from task t's model.
- From both: CLIP's two encoders and LLaVA's language model replace a ViT with a classification head; s is
  alpha / r, while the official code has no alpha.
- Weight decay pulls a magnitude towards its value at the task's start, not towards 0.

The delta of task t has rank t r, so the deltas of all tasks together have rank t (t + 1) r / 2 where t r
would suffice; `export --rank` with t r loses nothing.

Legend: in / out features of a layer, r rank, t the task's number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from llava_keeplora.adapters import ADAPTER, Delta, lora_layers
from llava_keeplora.deepspeed_zero import trained_values
from llava_keeplora.methods.base import MethodInfo, TaskContext
from llava_keeplora.methods.seq_lora import SequentialLora

#: Name of the parameter on the model: the change of each magnitude since the task's start, the new task's
#: last.
SHIFT = "magnitude_shift"


@dataclass(frozen=True)
class Directions:
    """The directions of all earlier tasks in one layer, with s multiplied into B.

    Args:
        A: ((t − 1) r, in).
        B: (out, (t − 1) r).
    """

    A: Tensor
    B: Tensor

    @classmethod
    def read(cls, deltas: list[Delta], rank: int) -> Directions:
        """Read each task's direction from its delta, in which it has the first `rank` rows of A."""
        return cls(
            torch.cat([d.A[:rank] for d in deltas]),
            torch.cat([d.scale * d.B[:, :rank] for d in deltas], dim=1),
        )

    def to(self, device: torch.device) -> Directions:
        """Return the directions on a device."""
        return Directions(self.A.to(device), self.B.to(device))

    def scaled(self, shift: Tensor) -> Tensor:
        """Return B (out, (t − 1) r) with each task's columns multiplied by its entry of `shift` (t − 1,)."""
        return self.B * shift.repeat_interleave(self.A.shape[0] // len(shift))


class SdLora(SequentialLora):
    """SD-LoRA as `methods/sd_lora.py` describes it."""

    info = MethodInfo(
        "sd-lora",
        "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning",
        "https://arxiv.org/abs/2501.13198",
        kept="nothing (A and B of every task are read from its delta)",
        trained="A and B, a magnitude per task",
    )
    supports_zero3 = False

    def __init__(self, options: SequentialLora.Options):
        super().__init__(options)
        self._directions: dict[str, Directions] = {}
        self._shift: nn.Parameter | None = None

    @contextmanager
    def training_context(self, ctx: TaskContext, model: nn.Module) -> Iterator[None]:
        """Put the magnitudes' changes on the model as a parameter.

        The weights already include the earlier directions with their magnitudes at the task's start.
        """
        layers, deltas = lora_layers(model), ctx.deltas()
        A = next(iter(layers.values())).lora_A[ADAPTER].weight
        self._shift = nn.Parameter(torch.zeros(len(deltas) + 1, dtype=A.dtype, device=A.device))
        self._directions = {
            name: Directions.read([d[name] for d in deltas], ctx.layers[name].rank)
            for name in layers
            if deltas
        }
        with ExitStack() as stack:
            model.register_parameter(SHIFT, self._shift)
            stack.callback(delattr, model, SHIFT)
            stack.callback(self._directions.clear)
            for name, layer in layers.items():
                hooks = [layer.lora_A[ADAPTER].register_forward_hook(self._magnify)]
                if deltas:
                    hooks.append(
                        model.get_submodule(name).register_forward_hook(
                            self._shifted(self._directions[name].to(A.device))
                        )
                    )
                for hook in hooks:
                    stack.callback(hook.remove)
            yield

    def _magnify(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Multiply the new direction by its magnitude."""
        return output * (1.0 + self._shift[-1])

    def _shifted(self, directions: Directions) -> Callable[..., Tensor]:
        """Return a hook that adds the effect of the changed magnitudes of earlier directions."""

        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            inner = linear(args[0].to(directions.A.dtype), directions.A)
            return output + linear(inner, directions.scaled(self._shift[:-1])).to(output.dtype)

        return add

    def finalize_deltas(self, ctx: TaskContext, deltas: Mapping[str, Delta]) -> Mapping[str, Delta]:
        """Return deltas of the new direction with its magnitude, and of the changes of the earlier ones."""
        shift = trained_values(self._shift).cpu()
        ctx.report["magnitude_shift"] = shift.tolist()
        combined = {}
        for name, delta in deltas.items():
            A, B = [delta.A], [delta.scale * (1.0 + shift[-1]) * delta.B]
            if name in self._directions:
                A.append(self._directions[name].A)
                B.append(self._directions[name].scaled(shift[:-1]))
            combined[name] = Delta(torch.cat(A), torch.cat(B, dim=1), 1.0)
        return combined
