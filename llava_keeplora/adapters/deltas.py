"""Deltas: the change of every module that a task trained, in memory and as a file.

Legend: in / out features of a layer, r rank. ΔW = scale · B A with A (r, in) and B (out, r), PEFT's naming.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llava_keeplora.errors import RunError
from llava_keeplora.files import copied_tensors, open_tensors, write_tensors
from llava_keeplora.records import NUMBER


@dataclass(frozen=True)
class Delta:
    """The low-rank change of one layer after one task, ΔW = scale · B A.

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
        """The tensors that are stored, by name."""
        return {"A": self.A, "B": self.B}

    def dense(self, device: torch.device | str = "cpu") -> Tensor:
        """Return ΔW (out, in) in fp32, computed on a device."""
        return (self.B.to(device).float() @ self.A.to(device).float()).mul_(self.scale)

    def changes(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return name of a parameter → its change in fp32, computed on a device."""
        return {"weight": self.dense(device)}


@dataclass(frozen=True)
class FullDelta:
    """The change of one module (linear layer, norm, embedding, ...) that was trained without an adapter.

    Args:
        parameters: name of each of the module's own parameters → its change, of the same shape.
    """

    parameters: Mapping[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are stored, by name."""
        return dict(self.parameters)

    def dense(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the change of the module's weight in fp32 on a device; for a linear layer ΔW (out, in)."""
        return self.parameters["weight"].to(device).float()

    def changes(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return name of a parameter → its change in fp32 on a device."""
        return {name: change.to(device).float() for name, change in self.parameters.items()}


Deltas = Mapping[str, Delta | FullDelta]


def save_deltas(path: Path, deltas: Deltas) -> str:
    """Write a task's deltas as safetensors and return the file's SHA-256."""
    tensors = {
        f"{name}.{key}": value for name, delta in deltas.items() for key, value in delta.tensors.items()
    }
    scales = {name: delta.scale for name, delta in sorted(deltas.items()) if isinstance(delta, Delta)}
    # One metadata entry: safetensors writes several in an order that changes from process to process.
    return write_tensors(path, tensors, {"scales": json.dumps(scales)})


def load_deltas(path: Path) -> dict[str, Delta | FullDelta]:
    """Read the deltas that `save_deltas` wrote.

    Raises:
        RunError: if the file holds no deltas, a layer's A or B is missing, or a scale is not finite.
    """
    file = open_tensors(path)
    tensors = copied_tensors(file)
    try:
        scales = json.loads((file.metadata() or {})["scales"])
        if not all(scale in NUMBER for scale in scales.values()):
            raise ValueError("a scale is no finite number")
        low_rank: dict[str, Delta | FullDelta] = {
            name: Delta(tensors.pop(f"{name}.A"), tensors.pop(f"{name}.B"), scale)
            for name, scale in scales.items()
        }
    except (KeyError, AttributeError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} holds no task's deltas ({'without ' if isinstance(error, KeyError) else ''}{error})",
            "restore it",
        ) from error
    return low_rank | full_deltas(tensors)


def full_deltas(changes: Mapping[str, Tensor]) -> dict[str, FullDelta]:
    """Group changes of parameters by module.

    Args:
        changes: full name of a parameter → its change.

    Returns:
        name of a module → the changes of its own parameters.
    """
    by_module: dict[str, dict[str, Tensor]] = {}
    for key, change in changes.items():
        module, _, name = key.rpartition(".")
        by_module.setdefault(module, {})[name] = change
    return {module: FullDelta(parameters) for module, parameters in by_module.items()}
