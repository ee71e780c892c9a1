"""DeepSpeed's operators, compiled when they are first needed: left-over locks, and one to do without.

Compilation holds a lock that torch waits for silently. A process that is killed while it compiles leaves the
lock behind, and every later start would wait for ever.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from llava_keeplora.errors import RunError

logger = logging.getLogger(__name__)

#: Age in seconds from which a lock counts as left behind; no operator takes as long to compile. A younger one
#: may belong to a process on another machine with the same home folder.
LONGEST = 600


def check_builds() -> None:
    """Check that no lock of a build was left behind; warn of young ones that no process here holds.

    Raises:
        RunError: naming the lock, if it was left behind.
    """
    for lock in unheld_locks():
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # Its build has ended since it was listed.
            continue
        finding = (
            f"{lock}, the lock of one of DeepSpeed's operators, is {age / 60:.0f} minutes old, but no "
            "process here is compiling it"
        )
        if age > LONGEST:
            raise RunError(f"{finding}, so a start would wait for it for ever", f"remove it: rm {lock}")
        logger.warning(
            "%s; if none on another machine is either, stop this start and remove the lock", finding
        )


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its all-reduce in shared memory when a group of CPU processes is set up.

    Only its inference engine calls that operator, and compiling takes the better part of a minute.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def unheld_locks() -> list[Path]:
    """Return locks of builds that no process of this machine holds open."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    held = _open_files() if locks else set()
    return [lock for lock in locks if str(lock.resolve()) not in held]


def _open_files() -> set[str]:
    """Return paths that processes of this user hold open; empty on systems without /proc."""
    open_files = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            open_files.add(os.readlink(link))
        except OSError:  # The process or its file no longer exists, or belongs to another user.
            continue
    return open_files
