"""Atomic writing of files and folders: everything is written under a temporary name and then renamed."""

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
    """Turn file-system errors (disk full, permission denied, read-only) into a one-sentence RunError.

    Args:
        where: the path to name if an error has none.

    Raises:
        RunError: for a full disk, or a file that must not be written; everything finished is kept.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (*FULL, *FORBIDDEN):
            raise RunError(*describe_os_error(error, where, GO_ON)) from error
        raise


def writable_folder(path: Path | str) -> Path:
    """Create a folder if it is missing, and check that a file can be written in it.

    Called before the work whose results it is for.

    Raises:
        OSError: if it cannot be created, or not be written to.
    """
    Path(path).mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=path):
        return Path(path)


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file atomically, and its folder if it is missing.

    Returns:
        the SHA-256 of its content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, value: Any) -> str:
    """Write a value as indented JSON and return the file's SHA-256."""
    return write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors as safetensors and return the file's SHA-256."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_bytes(path, save(contiguous, dict(metadata or {})))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all of a safetensors file; see `open_tensors` and `copied_tensors`."""
    return copied_tensors(open_tensors(path))


def copied_tensors(file: safe_open) -> dict[str, Tensor]:
    """Return all tensors of an open file.

    Each tensor is copied to where the allocator puts it. In the mapped file it starts wherever the header
    ends, and products round otherwise there: a resumed run would not end as one that never stopped.
    """
    return {name: file.get_tensor(name).clone() for name in file.keys()}


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file, whose tensors can be read one by one.

    Raises:
        RunError: if the file is missing or is not safetensors.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read as safetensors ({str(error).splitlines()[0]})", "restore it"
        ) from error


@contextmanager
def whole_folder(folder: Path | str, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder to fill, and rename it to `folder` at the end, so that no partial one appears.

    Until then its name is `.NAME.PROCESS.part`. It is removed after an error; what a killed process has left
    is removed by the next command that writes the same folder. It is locked while it is filled, by which it
    is distinguished from a left-over one.

    Args:
        folder: the final path.
        replace: whether an existing folder is replaced. Otherwise its files of the same names are replaced
            one by one after all have been written, and its other files stay.

    Raises:
        OSError: if it cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
    merged = not replace and folder.is_dir()
    # An existing folder may be a mount point, and its parent on another disk.
    parent = folder if merged else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    for left_over in parent.glob(f".{glob.escape(folder.name)}.*{PART}"):
        if left_over.is_dir() and not _is_locked(left_over):
            shutil.rmtree(left_over, ignore_errors=True)
    tmp_dir, old = (parent / f".{folder.name}.{os.getpid()}{kind}{PART}" for kind in ("", ".old"))
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
                os.replace(
                    folder, old
                )  # Renamed, because a kill while it is removed would leave a part of it.
            os.replace(tmp_dir, folder)
            sync_folder(folder.parent)
    finally:
        os.close(lock)
        for path in (tmp_dir, old):
            shutil.rmtree(path, ignore_errors=True)


def _flush(tmp_dir: Path) -> None:
    """Flush a folder's content to the disk, so that it is there before the folder's final name is."""
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
    """Return the temporary folders that killed processes left in or next to a folder; see `whole_folder`."""
    partial = [*folder.rglob(f".*{PART}"), *folder.parent.glob(f".{glob.escape(folder.name)}.*{PART}")]
    return sorted(path for path in partial if path.is_dir() and not _is_locked(path))


def _is_locked(folder: Path) -> bool:
    """Return whether a living process is filling a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
