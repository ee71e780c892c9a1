"""The base weights, from which the model after any task is rebuilt: base + the tasks' deltas.

Legend: in / out features of a layer, R the ranks of all deltas together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from llava_keeplora.adapters.deltas import Delta, Deltas, FullDelta
from llava_keeplora.adapters.weights import dense_weight, is_quantised
from llava_keeplora.deepspeed_zero import is_partitioned


class BaseWeights:
    """The layers of the base, to which the deltas of any number of tasks can be applied.

    An ordinary module's parameters are set to W_0 + Σ ΔW_i, summed in fp32 and rounded to the model's dtype
    once. So a resumed run rebuilds the same weights, bit for bit, as an uninterrupted one, and rounding
    errors in bf16 do not accumulate. A weight that is quantised or sharded is never written; there the deltas
    are added to the layer's output, y = W_0 x + Σ s_i B_i (A_i x); see `is_stacked`.

    Args:
        layers: name → module, with the base's weights at construction; modules that are not linear layers
            accept full deltas only.
        stacked: whether deltas are added to the output of every linear layer, so that they are quick to
            change and their weights are never copied.
    """

    def __init__(self, layers: Mapping[str, nn.Module], stacked: bool = False):
        self._layers: dict[str, _Summed | _Stacked] = {}
        for name, layer in layers.items():
            on_output = is_stacked(layer) or (stacked and isinstance(layer, nn.Linear))
            self._layers[name] = _Stacked(layer) if on_output else _Summed(layer)  # type: ignore[arg-type]

    @torch.no_grad()
    def apply(self, deltas: Iterable[Deltas]) -> None:
        """Set every layer to the base plus its deltas, summed in the order given."""
        deltas = list(deltas)
        for name, layer in self._layers.items():
            layer.carry([task[name] for task in deltas if name in task])

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Take off what the layers carry while the block runs; afterwards they carry the same, bit for bit.

        It takes as long however many tasks' deltas they carry, and the memory of one layer.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for layer in self._layers.values():
            layer.swap()

    @torch.no_grad()
    def copy_of(self, model: nn.Module) -> nn.Module:
        """Return a frozen copy of the model with the base's weights, whatever it carries now."""
        base = copy.deepcopy(model).eval().requires_grad_(False)
        changed = [(name, layer) for name, layer in self._layers.items() if isinstance(layer, _Summed)]
        for name, layer in changed:  # Weights that are stacked are never written.
            for parameter, value in layer.base.items():
                base.get_submodule(name).get_parameter(parameter).copy_(value)
        return base


def is_stacked(layer: nn.Module) -> bool:
    """Return whether a layer's deltas are added to its output instead of its weight.

    This is so for quantised weights, which would round the deltas away, and for shards of ZeRO-3.
    """
    return is_quantised(layer) or any(map(is_partitioned, layer.parameters(recurse=False)))


def merged_weight(name: str, layer: nn.Linear, deltas: Iterable[Deltas]) -> Tensor:
    """Return the weight (out, in) in fp32 with which a layer computes, its deltas included.

    Args:
        name: full name of the layer.
        layer: the layer; every process must call this if its weight is sharded.
        deltas: the deltas that it carries, which are added where they are not part of the weight.
    """
    weight = dense_weight(layer).detach().float()
    if is_stacked(layer):
        for task in deltas:
            if name in task:
                weight = weight + task[name].dense(weight.device)
    return weight


class _Summed:
    """A module whose deltas are added to its parameters.

    A copy of the base's parameters is kept in host memory, to save device memory.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.base = {
            name: p.detach().to("cpu", copy=True) for name, p in module.named_parameters(recurse=False)
        }

    def carry(self, changes: Sequence[Delta | FullDelta]) -> None:
        device = next(self.module.parameters(recurse=False)).device
        totals = {name: base.to(device, torch.float32, copy=True) for name, base in self.base.items()}
        for change in changes:
            for name, value in change.changes(device).items():
                totals[name] += value
        for name, total in totals.items():
            self.module.get_parameter(name).copy_(total)

    def swap(self) -> None:
        """Exchange the parameters and the base's; in between, `base` holds what was learned."""
        for name, base in self.base.items():
            parameter = self.module.get_parameter(name)
            carried = parameter.detach().to("cpu", copy=True)
            parameter.copy_(base)
            base.copy_(carried)


class _Stacked:
    """A linear layer whose deltas are added to its output."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer
        self._handle: RemovableHandle | None = None
        #: Adds what the layer carries to its output; None for nothing.
        self._add: Callable[..., Tensor] | None = None

    def swap(self) -> None:
        """Stop adding what the layer carries, or add it again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        elif self._add is not None:
            self._handle = self.layer.register_forward_hook(self._add)

    def carry(self, changes: Sequence[Delta | FullDelta]) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._add = None
        device = self.layer.weight.device
        full = [change for change in changes if isinstance(change, FullDelta)]
        weight = sum(change.parameters["weight"].to(device) for change in full) if full else None
        biases = [change.parameters["bias"].to(device) for change in full if "bias" in change.parameters]
        bias = sum(biases) if biases else None
        low = [change for change in changes if isinstance(change, Delta)]
        A = torch.cat([change.A for change in low]).to(device) if low else None  # (R, in)
        B = (
            torch.cat([change.scale * change.B for change in low], dim=1).to(device) if low else None
        )  # (out, R)

        # The closure must not refer to the deltas themselves: it would keep a second copy in memory.
        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            x = args[0]
            if A is not None:
                output = output + linear(linear(x, A.to(x)), B.to(x)).to(output.dtype)
            if weight is not None:
                output = output + linear(x, weight.to(x), None if bias is None else bias.to(x)).to(
                    output.dtype
                )
            return output

        if changes:
            self._add = add
            self._handle = self.layer.register_forward_hook(add)
