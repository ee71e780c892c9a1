"""Measurement of the peak memory of a block of code."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PROCESS = Path("/proc/self")
#: Written to `clear_refs`, resets the process's high-water mark; see proc_pid_clear_refs(5).
RESTART = "5"


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure the peak memory of a block.

    At the end of the block, the yielded record holds ``peak_bytes`` and ``peak_of``, which names what was
    measured: on a GPU the tensors that PyTorch held on it during the block (`gpu`); on the CPU the process's
    resident memory during the block (`process`) or, if the system does not let the mark be reset, since the
    process began (`process since its start`).

    Args:
        device: where the model is.
    """
    record: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield record
        record |= {"peak_bytes": torch.cuda.max_memory_allocated(device), "peak_of": "gpu"}
        return
    restarted = _restart()
    yield record
    record |= {"peak_bytes": _high_water(), "peak_of": "process" if restarted else "process since its start"}


def _restart() -> bool:
    """Reset the high-water mark to what is resident now; return False if the system does not allow it."""
    try:
        (PROCESS / "clear_refs").write_text(RESTART)
    except OSError:
        return False
    return True


def _high_water() -> int:
    """Return the process's peak resident memory in bytes, from /proc or else from `getrusage`."""
    try:
        line = next(
            line for line in (PROCESS / "status").read_text().splitlines() if line.startswith("VmHWM:")
        )
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(line.split()[1])
