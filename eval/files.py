"""Atomic writing of files: a reader sees the old content or the new one, never a part."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from llava_keeplora_eval.interruption import finishing

#: Suffix of a file that isn't complete yet.
PART = ".part"


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Replace a file in one step: temporary name in the same folder, flush, fsync, rename.

    Args:
        path: the file to write; its folder must exist.
        content: the complete content; text is written as UTF-8, with its line ends as they are.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    with finishing():
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path) -> None:
    """Remove incomplete files of killed processes in a folder and below; no other process may write there.

    Incomplete folders below are left with their content, because another process may still be filling one.
    """
    for path in folder.rglob(f".*{PART}"):
        inside = any(parent.name.endswith(PART) for parent in path.relative_to(folder).parents)
        if not path.is_dir() and not inside:
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in ``folder`` survive a power cut (POSIX; elsewhere a no-op)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
