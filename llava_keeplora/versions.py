"""The versions of the libraries, and the numbers of workers, on which a run's numbers depend."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from llava_keeplora.distributed import get_world_size
from llava_keeplora.files import write_json
from llava_keeplora.run_folder import VERSIONS, read_record

#: Libraries whose kernels, loaders and adapters determine the last bits of a result.
LIBRARIES = (
    "llava-keeplora",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "numpy",
)

#: Libraries that determine the pixels of an image.
DECODERS = ("pillow", "torchvision")

#: Keys of the same record for the numbers of workers, which determine the order of sums.
WORKERS = ("threads", "processes")


#: A library's version, read once per process: every reading parses the library's metadata.
_version = cache(metadata.version)


def installed_versions() -> dict[str, str]:
    """Return library → version, including Python's."""
    return {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES}


def decoder_versions() -> dict[str, str]:
    """Return library → version of the installed libraries that decode images."""
    versions = {}
    for name in DECODERS:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def write_versions(run: Path) -> None:
    """Record versions and numbers of workers in a new run folder."""
    write_json(
        run / VERSIONS, installed_versions() | {name: str(count) for name, count in worker_counts().items()}
    )


def worker_counts() -> dict[str, int]:
    """Return the numbers of threads and processes, which determine the order of sums and so the last bits."""
    import torch

    return {"threads": torch.get_num_threads(), "processes": get_world_size()}


def worker_changes(run: Path) -> list[str]:
    """Return `threads 1 → 2` for each number of workers that differs from the run's record, if it has one.

    Raises:
        RunError: if the record is damaged.
    """
    path = run / VERSIONS
    begun = read_record(path) if path.exists() else {}
    return [
        f"{name} {begun[name]} → {count}"
        for name, count in worker_counts().items()
        if name in begun and begun[name] != str(count)
    ]


def version_changes(run: Path) -> list[str]:
    """Return `torch 2.9.0 → 2.10.0` for every library that differs from the run's record, if it has one.

    Raises:
        RunError: if the record is damaged.
    """
    path = run / VERSIONS
    if not path.exists():
        return []
    now = installed_versions()
    return [
        f"{name} {version} → {now.get(name, 'none')}"
        for name, version in read_record(path).items()
        if name not in WORKERS and version != now.get(name)
    ]
