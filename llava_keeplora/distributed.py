"""The group of processes of a run, if there are several."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor


def get_rank() -> int:
    """Return this process's rank in the group; 0 without a group."""
    return dist.get_rank() if has_group() else 0


def get_world_size() -> int:
    """Return the number of processes in the group; 1 without a group."""
    return dist.get_world_size() if has_group() else 1


def processes_here() -> int:
    """Return how many processes of the group run on this machine; every process must call this."""
    return all_gather_object(socket.gethostname()).count(socket.gethostname())


def has_group() -> bool:
    """Return whether this process is in a group, possibly alone."""
    return dist.is_available() and dist.is_initialized()


def is_main_process() -> bool:
    """Return whether this is the process that writes and reports, rank 0."""
    return get_rank() == 0


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block in the main process first, and in the others only if it succeeded there.

    Raises:
        SystemExit: in the other processes, with code 2 and without a message, if the main process failed.
    """
    if get_world_size() == 1:
        yield
        return
    if is_main_process():
        passed = [False]
        try:
            yield
            passed = [True]
        finally:
            dist.broadcast_object_list(passed)
        return
    passed = [None]
    dist.broadcast_object_list(passed)
    if not passed[0]:
        raise SystemExit(2)
    yield


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes; every process must call this."""
    if get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def all_gather_object(value: Any) -> list[Any]:
    """Return the values of all processes, by rank; every process must call this."""
    if get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
