"""What a task leaves behind: one rank-r delta per layer. The base weights are never written to.

Legend: in / out features of a layer, r rank. ΔW = scale · B A with A (r, in) and B (out, r), PEFT's naming.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llava_keeplora.files import write_tensors


@dataclass(frozen=True)
class Delta:
    """ΔW = scale · B A of one layer after one task.

    Args:
        A: (r, in).
        B: (out, r).
        scale: s = alpha / r.
    """

    A: Tensor
    B: Tensor
    scale: float

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored of it, by name."""
        return {"A": self.A, "B": self.B}

    def dense(self) -> Tensor:
        """ΔW (out, in) in fp32."""
        return self.scale * (self.B.float() @ self.A.float())


@dataclass(frozen=True)
class FullDelta:
    """The change of one layer that was trained as it is, without an adapter.

    Args:
        weight: ΔW (out, in).
        bias: (out,), or None for a layer without one.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored of it, by name."""
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def dense(self) -> Tensor:
        """ΔW (out, in) in fp32."""
        return self.weight.float()


Deltas = Mapping[str, Delta | FullDelta]


def save_deltas(path: Path, deltas: Deltas) -> str:
    """Write a task's deltas as safetensors and return the file's SHA-256."""
    tensors = {f"{name}.{key}": value for name, delta in deltas.items() for key, value in delta.tensors.items()}
    scales = {name: delta.scale for name, delta in sorted(deltas.items()) if isinstance(delta, Delta)}
    # One metadata entry: safetensors writes several in an order that changes from process to process.
    return write_tensors(path, tensors, {"scales": json.dumps(scales)})


def load_deltas(path: Path) -> dict[str, Delta | FullDelta]:
    """Read what `save_deltas` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        scales = json.loads(file.metadata()["scales"])
    full = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    return {name: Delta(tensors[f"{name}.A"], tensors[f"{name}.B"], scale) for name, scale in scales.items()} | {
        name: FullDelta(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for name in full
    }


class BaseWeights:
    """The base's own weights of the trained layers, from which the model of any stage is rebuilt.

    W_t = W_0 + Σ ΔW_i is summed in fp32 and rounded to the model's dtype once, so a run that goes on
    rebuilds bit for bit what an undisturbed one holds, and no rounding piles up in bf16.

    Args:
        layers: name → linear layer, holding the base's weights at construction.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]):
        self.layers = dict(layers)
        self.weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        self.biases = {name: layer.bias.detach().clone() for name, layer in layers.items() if layer.bias is not None}

    @torch.no_grad()
    def apply(self, deltas: Iterable[Deltas]) -> None:
        """Set every layer's weight and bias to the base's plus its deltas, summed in the order given."""
        deltas = list(deltas)
        for name, layer in self.layers.items():
            own = [task[name] for task in deltas if name in task]
            layer.weight.copy_(_sum(self.weights[name], [delta.dense() for delta in own]))
            if name in self.biases:
                layer.bias.copy_(_sum(self.biases[name], [d.bias for d in own if isinstance(d, FullDelta) and d.bias is not None]))


def _sum(base: Tensor, changes: list[Tensor]) -> Tensor:
    total = base.float().clone()
    for change in changes:
        total += change.to(total)
    return total
