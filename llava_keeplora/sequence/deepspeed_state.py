"""The shard of a training that one process of a DeepSpeed engine holds: fp32 weights and optimiser state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from llava_keeplora.deepspeed_zero import is_partitioned
from llava_keeplora.sequence.checkpoint import TrainingState, load_optimizer, optimizer_state

#: Attributes under which the optimisers of ZeRO-1 and 2, ZeRO-3, bf16 and fp16 hold their fp32 weights.
MASTERS = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat_partition",
    "fp32_groups_flat",
)


class DeepSpeedShard:
    """One process's shard of an engine's training, read and restored between two steps.

    DeepSpeed's own checkpoints are pickles, which can run code when they are read; here everything is tensors
    and numbers.

    Args:
        engine: as returned by `deepspeed.initialize`.
    """

    def __init__(self, engine: Any):
        self.outer = engine.optimizer
        self.inner = getattr(self.outer, "optimizer", self.outer)
        # Empty without ZeRO and in fp32, where the optimiser updates the weights themselves.
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
        """Whether DeepSpeed swaps the optimiser's state to files of its own, where it cannot be read."""
        return getattr(self.outer, "optimizer_swapper", None) is not None

    def state(self) -> TrainingState:
        """Return this process's tensors, and the values that are the same in all processes."""
        with self._whole_groups():
            optimizer = optimizer_state(self.inner)
        tensors = {f"optimizer.{name}": value for name, value in optimizer.tensors.items()}
        tensors |= {f"masters.{i}": value.detach() for i, value in enumerate(self.masters)}
        tensors |= {f"shards.{name}": value.detach() for name, value in self.shards.items()}
        return TrainingState(tensors, {"optimizer": optimizer.values, "scale": self._scale()})

    def restore(self, state: TrainingState) -> None:
        """Restore a state that `state` returned; every process must call this."""
        persistent = getattr(self.outer, "persistent_parameters", [])
        if persistent:
            # ZeRO-3 keeps small parameters whole between steps; they are gathered again from the shards.
            persistent[0].partition(persistent)
        for kind, targets in (("masters", dict(enumerate(self.masters))), ("shards", self.shards)):
            for name, value in targets.items():
                value.data.copy_(state.tensors[f"{kind}.{name}"])
        if persistent:
            persistent[0].all_gather(persistent)
        with self._whole_groups():
            load_optimizer(self.inner, state.under("optimizer"), state.values["optimizer"])
        self._scaler.update(state.values["scale"])

    @property
    def _scaler(self) -> dict[str, Any]:
        """The attributes of fp16's loss scaler; empty without one."""
        scaler = getattr(self.outer, "loss_scaler", None)
        return vars(scaler) if hasattr(scaler, "__dict__") else {}

    def _scale(self) -> dict[str, Any]:
        return {key: value for key, value in self._scaler.items() if isinstance(value, (bool, int, float))}

    @contextmanager
    def _whole_groups(self) -> Iterator[None]:
        """Put the fp32 weights into the optimiser's parameter groups while the block runs.

        ZeRO-3 itself does so only during a step.
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
