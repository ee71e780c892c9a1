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

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llava_keeplora.errors import RunError
from llava_keeplora_eval.files import PART, sync_folder, write_atomic
from llava_keeplora_eval.guard import FORBIDDEN, FULL, describe_os_error

GO_ON = "run the same command again: it goes on, every finished stage is kept"


@contextmanager
def translate_errors(where: Path | str = "a file") -> Iterator[None]:
    """Tell in one sentence what the file system refuses.

    Args:
        where: what an error is about that names no file.

    Raises:
        RunError: for a full disk, or a file that may not be written; everything finished is kept.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (*FULL, *FORBIDDEN):
            raise RunError(*describe_os_error(error, where, GO_ON)) from error
        raise


def writable_folder(path: Path | str) -> Path:
    """A folder, made where it is not there, in which a file can be written.

    Found out before the work that fills it.

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


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write safetensors; returns its SHA-256."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_bytes(path, save(contiguous, dict(metadata or {})))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all of a safetensors file; see `open_tensors`."""
    file = open_tensors(path)
    return {name: file.get_tensor(name) for name in file.keys()}


def open_tensors(path: Path) -> safe_open:
    """Open safetensors, to read one by one.

    Raises:
        RunError: if the file is missing or holds none.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read as safetensors ({str(error).splitlines()[0]})", "restore it"
        ) from error


@contextmanager
def whole_folder(folder: Path | str, replace: bool = True) -> Iterator[Path]:
    """Yield a folder to fill, which takes a name at the end: the named folder appears whole or not at all.

    Until then it is named `.NAME.PROCESS.part`. An error removes it; what a killed process left is removed by
    the next command that makes the same folder. It is locked while it is filled, so that what a living
    process is writing can be told from that.

    Args:
        folder: the place.
        replace: whether all that is there goes. Otherwise files of the same names are replaced when all are
            written, each at once, and others stay.

    Raises:
        OSError: if it cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
    merged = not replace and folder.is_dir()
    # A folder that stays may be a mount point, and what is beside it another disk.
    beside = folder if merged else folder.parent
    beside.mkdir(parents=True, exist_ok=True)
    for left in beside.glob(f".{glob.escape(folder.name)}.*{PART}"):
        if left.is_dir() and not _is_locked(left):
            shutil.rmtree(left, ignore_errors=True)
    tmp_dir, old = (beside / f".{folder.name}.{os.getpid()}{kind}{PART}" for kind in ("", ".old"))
    tmp_dir.mkdir()
    lock = os.open(tmp_dir, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield tmp_dir
        _flush(tmp_dir)
        if merged:
            _move_files(tmp_dir, folder)
        else:
            if folder.is_dir() and any(folder.iterdir()):
                os.replace(folder, old)  # Removing takes time, in which a kill would leave a part.
            os.replace(tmp_dir, folder)
            sync_folder(folder.parent)
    finally:
        os.close(lock)
        for left in (tmp_dir, old):
            shutil.rmtree(left, ignore_errors=True)


def _flush(tmp_dir: Path) -> None:
    """Have all that a folder holds on the disk before its name is."""
    for path in tmp_dir.rglob("*"):
        if path.is_dir() or (path.is_file() and not path.is_symlink()):
            sync_folder(path)
    sync_folder(tmp_dir)


def _move_files(tmp_dir: Path, folder: Path) -> None:
    for path in sorted(tmp_dir.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(tmp_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
            sync_folder(target.parent)


def left_behind(folder: Path) -> list[Path]:
    """Rooms in a folder, below and beside it that killed processes left; see `whole_folder`."""
    found = [*folder.rglob(f".*{PART}"), *folder.parent.glob(f".{glob.escape(folder.name)}.*{PART}")]
    return sorted(path for path in found if path.is_dir() and not _is_locked(path))


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
