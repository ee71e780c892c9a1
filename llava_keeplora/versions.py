"""The versions of the libraries that a run's numbers depend on."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from llava_keeplora.distributed import get_world_size
from llava_keeplora.files import write_json
from llava_keeplora.run_folder import VERSIONS, read_record

#: Their kernels, loaders and adapters decide the last bits of a result.
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

#: They decide the pixels.
DECODERS = ("pillow", "torchvision")


#: What else decides the last bits, in the same record.
WORKERS = ("threads", "processes")


def installed_versions() -> dict[str, str]:
    """Library → its version; Python's own among them."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}


def decoder_versions() -> dict[str, str]:
    """Library → its version, of those that turn files into pixels; one that isn't installed is left out."""
    found = {}
    for name in DECODERS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write_versions(run: Path) -> None:
    """Record in a new run folder what it was begun with."""
    write_json(
        run / VERSIONS, installed_versions() | {name: str(count) for name, count in worker_counts().items()}
    )


def worker_counts() -> dict[str, int]:
    """Return how many threads and processes share the sums of this process's run.

    Their order decides the last bits.
    """
    import torch

    return {"threads": torch.get_num_threads(), "processes": get_world_size()}


def worker_changes(run: Path) -> list[str]:
    """Return `threads 1 → 2` for each count that is not what the run was begun with.

    Nothing for a run without a record of it.

    Raises:
        RunError: if the record was damaged.
    """
    path = run / VERSIONS
    begun = read_record(path) if path.exists() else {}
    return [
        f"{name} {begun[name]} → {count}"
        for name, count in worker_counts().items()
        if name in begun and begun[name] != str(count)
    ]


def version_changes(run: Path) -> list[str]:
    """`torch 2.9.0 → 2.10.0` for every library that is not what the run was begun with.

    Nothing for a run without a record.

    Raises:
        RunError: if the record was damaged.
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
