"""Joining and leaving the group of processes that a launcher started."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from llava_keeplora.config import RunConfig
from llava_keeplora.deepspeed_ops import check_builds, skip_shared_memory_op
from llava_keeplora.distributed import has_group, is_main_process

#: Time-out of collective operations: the others wait while the main process scores and writes.
PATIENCE = timedelta(days=1)
#: Numbers of this process's groups; every process joins as many.
_GROUPS = itertools.count()


@contextmanager
def processes(config: RunConfig) -> Iterator[bool]:
    """Join the launcher's processes, if there are several, and leave them at the end.

    A single process, launched or not, needs no group: the launcher's variables would only make accelerate
    wrap the model without need. With a DeepSpeed configuration, a single process forms a group of one.

    Args:
        config: the run; with `training.deepspeed`, DeepSpeed sets up the group.

    Yields:
        whether this is the main process, the one that writes and reports.

    Raises:
        RunError: if a killed process left the lock of a build of DeepSpeed's operators.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    leave = dist.destroy_process_group
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if any(m.training.get("deepspeed") for m in config.methods.values()):
        import deepspeed

        check_builds()
        skip_shared_memory_op()
        # Started by plain `python`: without these, DeepSpeed would look for MPI to set up the group of one.
        for key, value in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }.items():
            os.environ.setdefault(key, value)
        # It also forgets the groups that DeepSpeed made, so that another run of this process makes new ones.
        leave = deepspeed.comm.destroy_process_group
        _join(backend)
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=PATIENCE)
    elif world > 1:
        _join(backend)
    else:
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(key, None)
    yield is_main_process()
    # Without this, gloo's threads may abort the interpreter at exit. Not in a `finally`: after an error the
    # launcher stops the other processes, and a barrier would wait for them for ever.
    if has_group():
        dist.barrier()
        leave()


def _join(backend: str) -> None:
    """Join the launcher's processes under keys that no earlier group of this process used.

    The processes find each other by addresses in a store. The one of `torchrun` outlives a group, so the next
    group would read the addresses of the last and wait for ever; the one that rank 0 opens for a group closes
    with it, perhaps while another process already asks it for the next.
    """
    addresses = _store(tuple(os.environ[key] for key in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")))
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"run-{next(_GROUPS)}", addresses),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=PATIENCE,
    )


@cache
def _store(_address: tuple[str, ...]) -> dist.Store:
    """Return the launcher's store, open for as long as the process lives."""
    store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
    return store


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
