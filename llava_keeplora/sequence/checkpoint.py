"""Checkpoints within a task's training, from which a killed run resumes: safetensors and JSON, no pickle.

A checkpoint holds only what a step changes: as tensors the trained weights, the optimiser's state and the
states of the random generators; as JSON the rest of the optimiser, the schedule and the Trainer's state.
Where a DeepSpeed engine shards the optimiser over the processes, each process adds a file with its shard.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_keeplora.distributed import all_gather_object, get_rank, get_world_size
from llava_keeplora.errors import RunError
from llava_keeplora.files import read_tensors, write_json, write_tensors
from llava_keeplora.run_folder import (
    TRAINING,
    TRAINING_TENSORS,
    read_training,
    record_digest,
    training_step,
    training_tensors,
)
from llava_keeplora_eval.files import file_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """The state of a training between two steps.

    Args:
        tensors: name → tensor.
        values: everything else, as plain data that JSON can hold.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `prefix.`, by their names without it."""
        return {
            name.removeprefix(f"{prefix}."): value
            for name, value in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }


class StepCheckpoint:
    """The last checkpoint of one task's training.

    Args:
        folder: the task's folder.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / TRAINING

    def write(self, step: int, state: TrainingState, share: Mapping[str, Tensor] | None = None) -> None:
        """Replace the last checkpoint; every process must call this.

        The JSON file is written last and names the tensor files with their hashes, so that a reader sees
        files that belong together or none.

        Args:
            step: number of optimiser steps taken.
            state: what all processes have in common; the main process's is written.
            share: tensors of this process alone; given by all processes or by none.
        """
        name, share_name = training_tensors(step), training_tensors(step, get_rank())
        files = {} if share is None else {share_name: write_tensors(self.folder / share_name, share)}
        hashes = {file: digest for written in all_gather_object(files) for file, digest in written.items()}
        if get_rank() == 0:
            hashes[name] = write_tensors(self.folder / name, state.tensors)
            record = {"tensors": name, "sha256": hashes, "values": state.values}
            write_json(self.path, record | {"record_sha256": record_digest(record)})
            self._remove_tensors(but=hashes)

    def read(self) -> TrainingState | None:
        """Return the last checkpoint's state with this process's shard; every process must call this.

        All processes get a state, or all get None: if there is no checkpoint, if one of its files is damaged,
        or if another number of DeepSpeed processes wrote it. The task's training then starts over.
        """
        if not any(all_gather_object(self.path.exists())):
            return None
        try:
            record = read_training(self.path)
            hashes = {Path(name).name: digest for name, digest in record["sha256"].items()}
            names, shares = [Path(record["tensors"]).name], len(hashes) - 1
            if shares:
                names.append(training_tensors(training_step(names[0]), get_rank()))
            intact = shares in (0, get_world_size())
            intact &= all(file_hash(self.folder / name) == hashes[name] for name in names)
        except (OSError, ValueError, KeyError, RunError):
            intact = False
        if not all(all_gather_object(intact)):
            if get_rank() == 0:
                logger.warning(
                    "%s and its tensors are damaged, or were written by another number of processes; the "
                    "task's training begins again",
                    self.path,
                )
            return None
        return TrainingState(
            {key: value for name in names for key, value in read_tensors(self.folder / name).items()},
            record["values"],
        )

    def remove(self) -> None:
        """Delete the checkpoint, once the task's update has been written."""
        self.path.unlink(missing_ok=True)
        self._remove_tensors()

    def _remove_tensors(self, but: Collection[str] = ()) -> None:
        for path in self.folder.glob(TRAINING_TENSORS):
            if path.name not in but:
                path.unlink()


def optimizer_state(optimizer: torch.optim.Optimizer) -> TrainingState:
    """Return an optimiser's state, with its tensors separate from its other values."""
    state_dict = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": v
        for index, of_parameter in state_dict["state"].items()
        for key, v in of_parameter.items()
        if isinstance(v, Tensor)
    }
    scalars = {
        str(index): {key: v for key, v in of_parameter.items() if not isinstance(v, Tensor)}
        for index, of_parameter in state_dict["state"].items()
    }
    return TrainingState(tensors, {"state": scalars, "param_groups": state_dict["param_groups"]})


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Load a state that `optimizer_state` returned into an optimiser."""
    state = {int(index): dict(scalars) for index, scalars in values["state"].items()}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state[int(index)][key] = value
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})
