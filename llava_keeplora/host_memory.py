"""What a process does with memory of the host that it frees."""

from __future__ import annotations

import ctypes
import os

#: glibc's `mallopt` parameters (malloc.h), and bytes: a block of the first size or more has a mapping of its
#: own, which is returned when the block is freed; of smaller ones, up to the second size stays.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
OWN_MAPPING, KEPT = 32 * 2**20, 2**30
#: What sets these sizes from outside.
SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let the process keep up to 1 GiB of what it frees for its next allocations; once, at its start.

    A step of training frees activations that the next one allocates again. By default glibc returns them to
    the system in between, which then clears every page anew: a tenth of the processor time of a small model
    (docs/performance.md). Weights and other blocks of 32 MiB and more are returned as before. An environment
    that sets the sizes itself is left as it is.

    Returns:
        whether the C library does so now; False with another one than glibc.
    """
    if any(os.environ.get(name) for name in SET_BY_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows names no process.
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, OWN_MAPPING) and mallopt(M_TRIM_THRESHOLD, KEPT))
