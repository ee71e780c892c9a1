"""Memory of training under a DeepSpeed configuration, by its ZeRO stage and the number of processes.

With P trained parameters and N processes, Adam's states and the fp32 master copy take 12 P bytes
(Rajbhandari et al., ZeRO, 2020, section 3). ZeRO-1 splits these N ways, ZeRO-2 the gradients as well, ZeRO-3
the parameters as well, of which those in use are gathered. Buckets are allocated at their full size, however
little is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_keeplora.config import as_mapping
from llava_keeplora.errors import ConfigError

#: DeepSpeed's defaults of `reduce_bucket_size` and `stage3_max_live_parameters`, in numbers.
BUCKET, LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Sharding:
    """Distribution of training over processes.

    Args:
        world: N, the number of processes.
        stage: ZeRO's stage; None without DeepSpeed.
        bucket: numbers of a reduce bucket.
        buckets: how many of these there are.
        live: most numbers that ZeRO-3 keeps gathered.
        optimizer_on_host: whether Adam's states and the master copy are in host memory.
        parameters_on_host: whether ZeRO-3's shards are.
    """

    world: int = 1
    stage: int | None = None
    bucket: int = BUCKET
    buckets: int = 1
    live: int = LIVE
    optimizer_on_host: bool = False
    parameters_on_host: bool = False

    @property
    def partitions(self) -> bool:
        """Whether weights are split over the processes."""
        return self.stage == 3

    def states(self, trained: int) -> tuple[int, int]:
        """Return the bytes of Adam's states and the master copy of `trained` numbers: on device, on host."""
        share = 12 * trained // (self.world if self.stage else 1)
        return (0, share) if self.optimizer_on_host else (share, 0)

    def gradients(self, trained: int, size: int) -> int:
        """Return the bytes of gradients and buckets on the device.

        Args:
            trained: how many numbers are trained.
            size: bytes of one.
        """
        share = trained * size // (self.world if self.stage >= 2 else 1)
        return share + self.bucket * size * self.buckets

    def parameters(self, whole: int, size: int) -> tuple[int, int]:
        """Return the bytes of the model's parameters while they are used: on device, on host.

        Args:
            whole: bytes of the unsplit model.
            size: bytes of one number.
        """
        if not self.partitions:
            return whole, 0
        share, gathered = whole // self.world, min(whole, self.live * size)
        return (gathered, share) if self.parameters_on_host else (min(whole, share + gathered), 0)


def read_sharding(deepspeed: Mapping[str, Any] | None, world: int, hidden: int) -> Sharding:
    """Read how a DeepSpeed configuration distributes training.

    Args:
        deepspeed: its content, or None without DeepSpeed.
        world: number of processes.
        hidden: width of the model, from which `transformers` derives `auto` sizes.

    Raises:
        ConfigError: a size is not a number.
    """
    if deepspeed is None:
        return Sharding(world)
    zero = deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    overlap = zero.get("overlap_comm")
    # The default of overlapping depends on the stage.
    overlap = stage == 3 if overlap is None else bool(overlap)
    contiguous = zero.get("contiguous_gradients", True) and stage > 0
    bucket = (
        hidden**2 if zero.get("reduce_bucket_size") == "auto" else _size(zero, "reduce_bucket_size", BUCKET)
    )
    return Sharding(
        world,
        stage,
        bucket,
        (2 if overlap and stage < 3 else 1) if contiguous else 0,
        _size(zero, "stage3_max_live_parameters", LIVE),
        _on_host(zero, "offload_optimizer"),
        _on_host(zero, "offload_param"),
    )


def _on_host(zero: Mapping[str, Any], key: str) -> bool:
    return (
        as_mapping(zero.get(key), f"training.deepspeed.zero_optimization.{key}").get("device", "none")
        != "none"
    )


def _size(zero: Mapping[str, Any], key: str, default: int) -> int:
    """Read a size of a DeepSpeed configuration, which may be written as 5e8.

    Raises:
        ConfigError: the value is not a number.
    """
    try:
        return int(float(zero.get(key, default)))
    except (TypeError, ValueError):
        raise ConfigError(
            f"the DeepSpeed configuration has zero_optimization.{key} {zero[key]!r}",
            "write a number, such as 5e8",
        ) from None
