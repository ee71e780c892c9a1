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

    def dense(self) -> Tensor:
        """ΔW (out, in) in fp32."""
        return self.scale * (self.B.float() @ self.A.float())


def save_deltas(path: Path, deltas: Mapping[str, Delta]) -> str:
    """Write a task's deltas as safetensors and return the file's SHA-256."""
    tensors = {f"{name}.{key}": getattr(delta, key) for name, delta in deltas.items() for key in ("A", "B")}
    # One metadata entry: safetensors writes several in an order that changes from process to process.
    return write_tensors(path, tensors, {"scales": json.dumps({name: delta.scale for name, delta in sorted(deltas.items())})})


def load_deltas(path: Path) -> dict[str, Delta]:
    """Read what `save_deltas` wrote."""
    with safe_open(path, framework="pt") as file:
        return {
            name: Delta(file.get_tensor(f"{name}.A"), file.get_tensor(f"{name}.B"), scale)
            for name, scale in json.loads(file.metadata()["scales"]).items()
        }


class BaseWeights:
    """The base's own weights of the adapted layers, from which the model of any stage is rebuilt.

    W_t = W_0 + Σ ΔW_i is summed in fp32 and rounded to the model's dtype once, so a run that goes on
    rebuilds bit for bit what an undisturbed one holds, and no rounding piles up in bf16.

    Args:
        layers: name → linear layer, holding the base's weights at construction.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]):
        self.layers = dict(layers)
        self.weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    @torch.no_grad()
    def apply(self, deltas: Iterable[Mapping[str, Delta]]) -> None:
        """Set every layer's weight to W_0 plus its deltas, summed in the order given."""
        deltas = list(deltas)
        for name, layer in self.layers.items():
            weight = self.weights[name].float().clone()
            for task in deltas:
                if name in task:
                    weight += task[name].dense().to(weight.device)
            layer.weight.copy_(weight)
