"""What one process of a DeepSpeed engine holds of a training beside everyone's.

Its share of the fp32 weights and their optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from llava_keeplora.deepspeed_zero import is_partitioned
from llava_keeplora.sequence.checkpoint import TrainingState, load_optimizer, optimizer_state

#: Where the optimisers of ZeRO-1 and 2, ZeRO-3, bf16 and fp16 have the fp32 weights that they update.
MASTERS = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat_partition",
    "fp32_groups_flat",
)


class DeepSpeedShard:
    """One process's part of an engine's training, taken out and put back between two steps.

    DeepSpeed's own checkpoints are pickles, which run code when they are read; these are tensors and numbers.

    Args:
        engine: of `deepspeed.initialize`.
    """

    def __init__(self, engine: Any):
        self.outer = engine.optimizer
        self.inner = getattr(self.outer, "optimizer", self.outer)
        # Without ZeRO and in fp32 there are none: the optimiser then updates the weights themselves.
        self.masters: list[Tensor] = next(
            (getattr(self.outer, name) for name in MASTERS if hasattr(self.outer, name)), []
        )
        self.shards = {
            name: p.ds_tensor
            for name, p in engine.module.named_parameters()
            if p.requires_grad and is_partitioned(p)
        }

    @property
    def is_swapped(self) -> bool:
        """Whether the optimiser lies in files of DeepSpeed's, where it can't be read."""
        return getattr(self.outer, "optimizer_swapper", None) is not None

    def state(self) -> TrainingState:
        """What this process holds: tensors of its own, and values that are the same in all of them."""
        with self._whole_groups():
            optimizer = optimizer_state(self.inner)
        tensors = {f"optimizer.{name}": value for name, value in optimizer.tensors.items()}
        tensors |= {f"masters.{i}": value.detach() for i, value in enumerate(self.masters)}
        tensors |= {f"shards.{name}": value.detach() for name, value in self.shards.items()}
        return TrainingState(tensors, {"optimizer": optimizer.values, "scale": self._scale()})

    def restore(self, state: TrainingState) -> None:
        """Take back what `state` gave; every process has to come along."""
        whole = getattr(self.outer, "persistent_parameters", [])
        if whole:
            # Small ones stay whole between steps; they are made again from the shards.
            whole[0].partition(whole)
        for kind, own in (("masters", dict(enumerate(self.masters))), ("shards", self.shards)):
            for name, value in own.items():
                value.data.copy_(state.tensors[f"{kind}.{name}"])
        if whole:
            whole[0].all_gather(whole)
        with self._whole_groups():
            load_optimizer(self.inner, state.under("optimizer"), state.values["optimizer"])
        self._scaler.update(state.values["scale"])

    @property
    def _scaler(self) -> dict[str, Any]:
        """What fp16's loss scale consists of."""
        scaler = getattr(self.outer, "loss_scaler", None)
        return vars(scaler) if hasattr(scaler, "__dict__") else {}

    def _scale(self) -> dict[str, Any]:
        return {key: value for key, value in self._scaler.items() if isinstance(value, (bool, int, float))}

    @contextmanager
    def _whole_groups(self) -> Iterator[None]:
        """The optimiser with its weights in its groups.

        ZeRO-3 puts them there for the length of a step alone.
        """
        group_of = getattr(self.outer, "sub_group_to_group_id", None)
        if group_of is None:
            yield
            return
        for number, group in enumerate(self.inner.param_groups):
            group["params"] = [master for i, master in enumerate(self.masters) if group_of[i] == number]
        try:
            yield
        finally:
            for group in self.inner.param_groups:
                group["params"] = []
