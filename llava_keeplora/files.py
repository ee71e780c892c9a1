"""Whole files and folders or none: everything is written under a temporary name and renamed."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from safetensors.torch import save
from torch import Tensor

from llava_keeplora.errors import RunError
from llava_keeplora_eval.files import PART, write_atomic

#: A disk, a quota, and the largest file that a user may write.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
GO_ON = "run the same command again: it goes on, every finished stage is kept"


@contextmanager
def told(where: Path | str = "a file") -> Iterator[None]:
    """Tell in one sentence what the file system refuses.

    Args:
        where: what an error is about that names no file.

    Raises:
        RunError: for a full disk, or a file that may not be written; everything finished is kept.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise RunError(f"there is no room for {error.filename or where} ({error.strerror})", f"make room, and {GO_ON}") from error
        if error.errno in FORBIDDEN:
            raise RunError(f"{error.filename or where} cannot be used ({error.strerror})", f"give this user the right to it, and {GO_ON}") from error
        raise


def writable_folder(path: Path | str) -> Path:
    """A folder, made where it is not there, in which a file can be written: found out before the work that fills it.

    Raises:
        OSError: if it can't be.
    """
    Path(path).mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=path):
        return Path(path)


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file so that it is there whole or not at all.

    Returns:
        the SHA-256 of its content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, value: Any) -> str:
    """Write JSON, readable by a person; returns its SHA-256."""
    return write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write safetensors; returns its SHA-256."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_bytes(path, save(contiguous, dict(metadata or {})))


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of another at the end and is gone after an error; a killed process's goes with the next.

    It is locked while it is filled, so that what a living process is writing can be told from what a killed one left.

    Args:
        folder: the place; what is there is replaced.
    """
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*{PART}"):
        if not _is_locked(left):
            shutil.rmtree(left, ignore_errors=True)
    room = folder.with_name(f".{folder.name}.{os.getpid()}{PART}")
    room.mkdir(parents=True)
    lock = os.open(room, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield room
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(room, folder)
    finally:
        os.close(lock)
        shutil.rmtree(room, ignore_errors=True)


def _is_locked(folder: Path) -> bool:
    """Whether a living process is filling a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
