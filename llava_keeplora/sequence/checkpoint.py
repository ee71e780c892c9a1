"""A task's training between two steps, so that a killed run goes on from there: safetensors and JSON, never a pickle.

What a step changes is all that is kept: trained weights, the optimiser's tensors, the states of the random generators, and
as JSON the rest of the optimiser, the schedule and the Trainer's own record.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llava_keeplora.files import file_hash, write_json, write_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """Training after some steps.

    Args:
        tensors: by name.
        values: what JSON can hold.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix.`, without it."""
        return {name.removeprefix(f"{prefix}."): value for name, value in self.tensors.items() if name.startswith(f"{prefix}.")}


class StepCheckpoint:
    """The last state of one task's training.

    Args:
        folder: the task's.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "training.json"

    def write(self, step: int, state: TrainingState) -> None:
        """Replace the last state. The JSON comes second and names its tensors with their hash, so that the two belong together."""
        name = f"training-{step}.safetensors"
        digest = write_tensors(self.folder / name, state.tensors)
        write_json(self.path, {"tensors": name, "sha256": digest, "values": state.values})
        self._remove_tensors(but=name)

    def read(self) -> TrainingState | None:
        """The last state; None where there is none, or where it is damaged, which costs the task's steps and nothing else."""
        if not self.path.exists():
            return None
        try:
            told = json.loads(self.path.read_text())
            tensors = self.folder / Path(told["tensors"]).name
            whole = file_hash(tensors) == told["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            logger.warning("%s and its tensors are not what was written; the task's training begins again", self.path)
            return None
        return TrainingState(load_file(tensors), told["values"])

    def remove(self) -> None:
        """Forget the state: the task is trained."""
        self.path.unlink(missing_ok=True)
        self._remove_tensors()

    def _remove_tensors(self, but: str | None = None) -> None:
        for path in self.folder.glob("training-*.safetensors"):
            if path.name != but:
                path.unlink()


def optimizer_state(optimizer: torch.optim.Optimizer) -> TrainingState:
    """An optimiser's state, its tensors apart from the rest."""
    whole = optimizer.state_dict()
    tensors = {f"{index}.{key}": v for index, own in whole["state"].items() for key, v in own.items() if isinstance(v, Tensor)}
    plain = {str(index): {key: v for key, v in own.items() if not isinstance(v, Tensor)} for index, own in whole["state"].items()}
    return TrainingState(tensors, {"state": plain, "param_groups": whole["param_groups"]})


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Put an optimiser into a state that `optimizer_state` took."""
    state = {int(index): dict(own) for index, own in values["state"].items()}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state[int(index)][key] = value
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})
