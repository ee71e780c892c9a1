"""The most memory that a piece of work took."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PROCESS = Path("/proc/self")
#: Written to `clear_refs`: the kernel starts the process's high-water mark anew (proc_pid_clear_refs(5)).
RESTART = "5"


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure a block.

    At its end, the yielded record holds ``peak_bytes`` and ``peak_of``, what they are the peak of.

    On a GPU that is the tensors that PyTorch held on it during the block (`gpu`); on the CPU the process's
    resident memory during the block (`process`) or, where the system doesn't let the mark be set back, since
    the process began (`process since its start`).

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
    """Set the high-water mark back to what is resident now; False where that is refused, or not known."""
    try:
        (PROCESS / "clear_refs").write_text(RESTART)
    except OSError:
        return False
    return True


def _high_water() -> int:
    """The process's highest resident memory in bytes; where there is no /proc, as `getrusage` tells it."""
    try:
        line = next(
            line for line in (PROCESS / "status").read_text().splitlines() if line.startswith("VmHWM:")
        )
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(line.split()[1])
