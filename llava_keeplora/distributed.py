"""The group of processes that a run takes part in, if there are several."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor


def get_rank() -> int:
    """This process's number in its group; 0 where there is none."""
    return dist.get_rank() if has_group() else 0


def get_world_size() -> int:
    """How many processes the group has; 1 where there is none."""
    return dist.get_world_size() if has_group() else 1


def processes_here() -> int:
    """How many processes of the group run on this machine; all must come along."""
    return all_gather_object(socket.gethostname()).count(socket.gethostname())


def has_group() -> bool:
    """Whether this process is in a group, be it of one."""
    return dist.is_available() and dist.is_initialized()


def is_main_process() -> bool:
    """Whether this process writes and reports."""
    return get_rank() == 0


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the first process go through a block before the others do.

    If it fails there, they leave without a word.

    Raises:
        SystemExit: in the other processes, with code 2, if the first one failed.
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
    """Replace each tensor by its sum over all processes, which must come along.

    Nothing where there is one.
    """
    if get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def all_gather_object(value: Any) -> list[Any]:
    """Every process's value by rank, in every process; all must come along."""
    if get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
