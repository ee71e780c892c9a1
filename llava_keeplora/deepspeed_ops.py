"""DeepSpeed's operators, compiled when first needed.

Compilation holds a lock that torch waits for silently.

A process that is killed while it compiles leaves the lock, and every later start would wait for ever.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from llava_keeplora.errors import RunError

logger = logging.getLogger(__name__)

#: No operator takes so many seconds to compile; a process on another machine with the same home may hold a
#: younger lock.
LONGEST = 600


def check_builds() -> None:
    """Refuse to wait for a build that nobody works on any more; say so where somebody on another machine may.

    Raises:
        RunError: naming the lock, if it was left behind.
    """
    for lock in unheld_locks():
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # Its build has ended since it was listed.
            continue
        what = (
            f"{lock}, the lock of one of DeepSpeed's operators, is {age / 60:.0f} minutes old and no process "
            "here is compiling it"
        )
        if age > LONGEST:
            raise RunError(f"{what}, so a start would wait for it for ever", f"remove it: rm {lock}")
        logger.warning("%s; if none on another machine is either, stop this start and remove the lock", what)


def unheld_locks() -> list[Path]:
    """Locks of builds that no process of this machine holds open."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    held = _open_files() if locks else set()
    return [lock for lock in locks if str(lock.resolve()) not in held]


def _open_files() -> set[str]:
    """Paths that processes of this user hold open, where the system lists them."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(os.readlink(link))
        except OSError:  # The process or its file has gone, or is another user's.
            continue
    return found
