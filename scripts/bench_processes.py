"""Whole commands as child processes: their processor time, and medians of several that take turns."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """What a command took.

    Args:
        cpu: seconds of processor time, user and system, of the process and its children.
        wall: seconds from its start to its end.
        output: what it wrote to stdout.
    """

    cpu: float
    wall: float
    output: str = ""


def run_command(
    command: Sequence[str], folder: Path, enough: Callable[[], bool] | None = None, threads: int | None = None
) -> Usage:
    """Run a command to its end, or until `enough`, and return what it took.

    Args:
        command: program and arguments.
        folder: where it runs, and where its output is kept in `stdout` and `stderr`.
        enough: asked while it runs; the process is killed when it returns True. None: it runs to its end.
        threads: threads of its numerical libraries; their own choice by default.

    Raises:
        SystemExit: the command failed.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    started = time.perf_counter()
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, env=environment)
        # `os.wait4` is the only call that returns the processor time of one child.
        while not (ended := os.wait4(process.pid, os.WNOHANG if enough else 0))[0]:
            if enough and enough():
                process.kill()
                ended = os.wait4(process.pid, 0)
                break
            time.sleep(0.01)
        else:
            if ended[1]:
                sys.exit(f"{' '.join(command)} failed: {(folder / 'stderr').read_text()[-3000:]}")
    process.returncode = 0
    wall = time.perf_counter() - started
    return Usage(ended[2].ru_utime + ended[2].ru_stime, wall, (folder / "stdout").read_text())


def in_turns(commands: Mapping[str, Callable[[], Usage]], repeats: int) -> dict[str, list[Usage]]:
    """Run every command several times, in turns, so that other work on the machine slows all of them."""
    taken: dict[str, list[Usage]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            taken[name].append(command())
            print(f"{name}: {taken[name][-1].cpu:.1f} s of processor time", file=sys.stderr, flush=True)
    return taken


def median(taken: Sequence[Usage]) -> Usage:
    """Return the medians of processor and wall time, with the last output."""
    return Usage(
        statistics.median(usage.cpu for usage in taken),
        statistics.median(usage.wall for usage in taken),
        taken[-1].output,
    )
