"""Joining and leaving the group of processes that a launcher started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from llava_keeplora.config import RunConfig


@contextmanager
def processes(config: RunConfig) -> Iterator[bool]:
    """Join the launcher's processes, if there are several; yields whether this is the one that writes and reports.

    A single process, launched or not, needs no group: the launcher's variables would only make
    accelerate wrap the model for nothing. A ZeRO configuration brings its own group of one.

    Args:
        config: the run; with `training.deepspeed` the group is DeepSpeed's.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if config.training.get("deepspeed") or any(m.training.get("deepspeed") for m in config.methods.values()):
        import deepspeed

        # A plain `python` start: DeepSpeed would look for MPI to learn what a group of one is.
        for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
            os.environ.setdefault(key, value)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    elif world > 1:
        dist.init_process_group(backend)
    else:
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(key, None)
    yield int(os.environ.get("RANK", "0")) == 0
    # Without this, gloo's threads may abort the interpreter on its way out. After an error the launcher
    # stops the others; waiting for them here would wait for ever.
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
