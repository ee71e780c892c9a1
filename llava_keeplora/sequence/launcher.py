"""Noticing that a launcher has ended: a rank that nobody supervises any more stops as on SIGTERM.

`kill PID` of `deepspeed` ends that process alone; the one below it and its ranks would train on. Processes
above this one are read from /proc; where there is none, nothing is watched.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

#: Words of a launcher's command line, by the last part of a path.
LAUNCHERS = {
    "deepspeed",
    "deepspeed.pt",
    "ds",
    "torchrun",
    "accelerate",
    "accelerate-launch",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate.commands.launch",
}
#: Seconds between two looks, and those that a rank has to stop by itself: it may be waiting for another that
#: has gone.
INTERVAL, PATIENCE = 1.0, 60.0


@contextmanager
def stopped_with_launcher() -> Iterator[None]:
    """Send this process SIGTERM when a launcher above it ends, and end it where that does not help."""
    above, left = launchers_above(), threading.Event()
    if above:
        threading.Thread(target=_watch, args=(above, left), daemon=True, name="launcher").start()
    try:
        yield
    finally:
        left.set()


def launchers_above() -> dict[int, str]:
    """Return process → time of start, of the launchers that started this process."""
    above, process = {}, os.getppid()
    while (record := _read(process)) and _is_launcher(process):
        above[process] = record[1]
        process = record[0]
    return above


def _watch(above: dict[int, str], left: threading.Event) -> None:
    while all((record := _read(process)) and record[1] == start for process, start in above.items()):
        if left.wait(INTERVAL):
            return
    logger.warning("the launcher of this process has ended; stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    if not left.wait(PATIENCE):
        os._exit(128 + signal.SIGTERM)


def _read(process: int) -> tuple[int, str] | None:
    """(parent, time of start) of a living process; see proc_pid_stat(5)."""
    try:
        # A name in brackets comes first, which may hold anything.
        fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), fields[19])


def _is_launcher(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    program, *arguments = (word.rsplit("/", 1)[-1] for word in words[:6])
    # A shell that names one is none: it may end while what it started goes on, as with nohup.
    return program in LAUNCHERS or (program.startswith("python") and not LAUNCHERS.isdisjoint(arguments))
