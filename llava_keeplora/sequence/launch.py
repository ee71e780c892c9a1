"""Joining and leaving the group of processes that a launcher started."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from llava_keeplora.config import RunConfig
from llava_keeplora.deepspeed_ops import check_builds
from llava_keeplora.distributed import has_group, is_main_process

#: The first process alone scores and writes; the others may have to wait long.
PATIENCE = timedelta(days=1)


@contextmanager
def processes(config: RunConfig) -> Iterator[bool]:
    """Join the launcher's processes, if there are several.

    Yields whether this is the one that writes and reports.

    A single process, launched or not, needs no group: the launcher's variables would only make
    accelerate wrap the model for nothing. A ZeRO configuration brings its own group of one.

    Args:
        config: the run; with `training.deepspeed` the group is DeepSpeed's.

    Raises:
        RunError: if a killed process left the lock of a build of DeepSpeed's operators.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if any(m.training.get("deepspeed") for m in config.methods.values()):
        import deepspeed

        check_builds()
        # A plain `python` start: DeepSpeed would look for MPI to learn what a group of one is.
        for key, value in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }.items():
            os.environ.setdefault(key, value)
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=PATIENCE)
    elif world > 1:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(key, None)
    yield is_main_process()
    # Without this, gloo's threads may abort the interpreter on its way out. After an error the launcher
    # stops the others; waiting for them here would wait for ever.
    if has_group():
        dist.barrier()
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
