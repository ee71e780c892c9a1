"""A task's training between two steps, so that a killed run goes on from there.

Safetensors and JSON, never a pickle.

What a step changes is all that is kept: trained weights, the optimiser's tensors, the states of the random
generators, and as JSON the rest of the optimiser, the schedule and the Trainer's own record. Where a
DeepSpeed engine spreads the optimiser over the processes, each of them adds a file of its share.
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
from llava_keeplora.run_folder import TRAINING, read_training, record_digest
from llava_keeplora_eval.files import file_hash

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
        return {
            name.removeprefix(f"{prefix}."): value
            for name, value in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }


class StepCheckpoint:
    """The last state of one task's training.

    Args:
        folder: the task's.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / TRAINING

    def write(self, step: int, state: TrainingState, share: Mapping[str, Tensor] | None = None) -> None:
        """Replace the last state; every process calls this.

        The JSON comes last and names the tensors with their hashes, so that they belong together.

        Args:
            step: how many were made.
            state: what all processes have in common; the first one's counts.
            share: tensors of this process alone; given by all or by none.
        """
        first, name = get_rank() == 0, f"training-{step}.safetensors"
        files = (
            {_share_name(step, get_rank()): write_tensors(self.folder / _share_name(step, get_rank()), share)}
            if share is not None
            else {}
        )
        shares = {file: digest for own in all_gather_object(files) for file, digest in own.items()}
        if first:
            shares[name] = write_tensors(self.folder / name, state.tensors)
            record = {"tensors": name, "sha256": shares, "values": state.values}
            write_json(self.path, record | {"record_sha256": record_digest(record)})
            self._remove_tensors(but=shares)

    def read(self) -> TrainingState | None:
        """The last state with this process's share.

        None where there is none, or where one is damaged, which costs the task's steps and nothing else.

        Every process calls this, and all get a state or none does. One that was written by another number of
        engine processes is none.
        """
        if not any(all_gather_object(self.path.exists())):
            return None
        try:
            told = read_training(self.path)
            hashes = {Path(name).name: digest for name, digest in told["sha256"].items()}
            names, shares = [Path(told["tensors"]).name], len(hashes) - 1
            if shares:
                names.append(
                    _share_name(
                        int(names[0].removeprefix("training-").removesuffix(".safetensors")), get_rank()
                    )
                )
            whole = all(file_hash(self.folder / name) == hashes[name] for name in names) and shares in (
                0,
                get_world_size(),
            )
        except (OSError, ValueError, KeyError, RunError):
            whole = False
        if not all(all_gather_object(whole)):
            if get_rank() == 0:
                logger.warning(
                    "%s and its tensors are not what was written, or by another number of processes; the "
                    "task's training begins again",
                    self.path,
                )
            return None
        return TrainingState(
            {key: value for name in names for key, value in read_tensors(self.folder / name).items()},
            told["values"],
        )

    def remove(self) -> None:
        """Forget the state: the task is trained."""
        self.path.unlink(missing_ok=True)
        self._remove_tensors()

    def _remove_tensors(self, but: Collection[str] = ()) -> None:
        for path in self.folder.glob("training-*.safetensors"):
            if path.name not in but:
                path.unlink()


def _share_name(step: int, rank: int) -> str:
    return f"training-{step}-{rank}.safetensors"


def optimizer_state(optimizer: torch.optim.Optimizer) -> TrainingState:
    """An optimiser's state, its tensors apart from the rest."""
    whole = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": v
        for index, own in whole["state"].items()
        for key, v in own.items()
        if isinstance(v, Tensor)
    }
    plain = {
        str(index): {key: v for key, v in own.items() if not isinstance(v, Tensor)}
        for index, own in whole["state"].items()
    }
    return TrainingState(tensors, {"state": plain, "param_groups": whole["param_groups"]})


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put an optimiser into a state that `optimizer_state` took."""
    state = {int(index): dict(own) for index, own in values["state"].items()}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state[int(index)][key] = value
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})
