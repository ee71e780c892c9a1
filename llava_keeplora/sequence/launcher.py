"""Stop of a rank whose launcher has ended, as on SIGTERM.

`kill PID` of `deepspeed` ends that process alone; its child and the ranks below it would train on. The parent
processes are read from /proc; on systems without it, nothing is watched.
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

#: Programs and modules that launch ranks, compared with the last part of the paths on a command line.
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
#: Seconds between two checks, and seconds after SIGTERM until a rank that has not stopped by itself is ended,
#: as it may be waiting for another rank that no longer exists.
INTERVAL, PATIENCE = 1.0, 60.0


@contextmanager
def stopped_with_launcher() -> Iterator[None]:
    """Send this process SIGTERM when a launcher above it ends, and exit if it has not stopped in time."""
    above, finished = launchers_above(), threading.Event()
    if above:
        threading.Thread(target=_watch, args=(above, finished), daemon=True, name="launcher").start()
    try:
        yield
    finally:
        finished.set()


def launchers_above() -> dict[int, str]:
    """Return process id → start time of the launchers that started this process."""
    above, process = {}, os.getppid()
    while (record := _read(process)) and _is_launcher(process):
        above[process] = record[1]
        process = record[0]
    return above


def _watch(above: dict[int, str], finished: threading.Event) -> None:
    while all((record := _read(process)) and record[1] == start for process, start in above.items()):
        if finished.wait(INTERVAL):
            return
    logger.warning("the launcher of this process has ended; stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    if not finished.wait(PATIENCE):
        os._exit(128 + signal.SIGTERM)


def _read(process: int) -> tuple[int, str] | None:
    """Return (parent, start time) of a living process, None for others; see proc_pid_stat(5)."""
    try:
        # The program's name comes first, in brackets; it may contain brackets and spaces itself.
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
    # A shell whose command line names a launcher is not one: with nohup it ends before what it started.
    return program in LAUNCHERS or (program.startswith("python") and not LAUNCHERS.isdisjoint(arguments))
