"""Whole files and folders or none: everything is written under a temporary name and renamed."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from llava_keeplora_eval.files import PART, write_atomic


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

    Args:
        folder: the place; what is there is replaced.
    """
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*{PART}"):
        shutil.rmtree(left, ignore_errors=True)
    room = folder.with_name(f".{folder.name}.{os.getpid()}{PART}")
    room.mkdir(parents=True)
    try:
        yield room
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(room, folder)
    finally:
        shutil.rmtree(room, ignore_errors=True)
