"""The machine: libraries, devices, memory, disk, and what the libraries need besides."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from llava_keeplora.deepspeed_ops import unheld_locks
from llava_keeplora.errors import RunError, UserError
from llava_keeplora_eval.java import METEOR, find_jar

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


def examine_machine() -> Iterator[str | UserError]:
    """What there is, line by line; an error for what has to be repaired before a run."""
    from llava_keeplora.plan.machine import (
        GB,  # imports the models, which a run's files can be examined without
    )

    yield from _libraries()
    yield from _devices()
    free = shutil.disk_usage(Path.cwd()).free
    yield f"disk: {free / GB:.1f} GB free in {Path.cwd()}"
    yield from _programs()
    for lock in unheld_locks():
        yield RunError(
            f"{lock} was left by a build that was killed, and every start of DeepSpeed would wait for it",
            f"remove it: `rm {lock}`",
        )
    offline = [name for name in OFFLINE if os.environ.get(name)]
    network = "offline, by " + ", ".join(offline) if offline else "may use the network"
    yield f"Hugging Face libraries: {network}"


def _libraries() -> Iterator[str | UserError]:
    needed = SpecifierSet(metadata.metadata("llava-keeplora")["Requires-Python"])
    yield _judged(
        "python", platform.python_version(), needed, "make the environment anew with a newer Python"
    )
    for text in metadata.requires("llava-keeplora") or ():
        requirement = Requirement(text)
        cure = f"install it: pip install '{requirement.name}{requirement.specifier}'"
        if requirement.marker is not None:  # Of an optional extra.
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield RunError(f"{requirement.name} is not installed", cure)
            continue
        yield _judged(requirement.name, found, requirement.specifier, cure)


def _judged(name: str, found: str, needed: SpecifierSet, cure: str) -> str | UserError:
    if needed.contains(found, prereleases=True):
        return f"{name} {found}"
    return RunError(f"{name} is {found}, and llava-keeplora needs {needed}", cure)


def _devices() -> Iterator[str]:
    from llava_keeplora.plan.machine import GB, host_memory  # see examine_machine

    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"GPU {index}: {device.name}, {device.total_memory / GB:.1f} GB"
    if not torch.cuda.is_available():
        yield "GPU: none, runs use the CPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"CPU: {cores} cores, {host_memory() / GB:.1f} GB of memory"


def _programs() -> Iterator[str]:
    """Programs that only some runs need, so that none of them is an error."""
    yield (
        "Java: found, METEOR is scored"
        if find_jar(METEOR)
        else "Java: none, so captions are scored without METEOR"
    )
    for program, names in (("C++ compiler", (os.environ.get("CXX", "c++"), "g++")), ("ninja", ("ninja",))):
        found = next((path for name in names if (path := shutil.which(name))), None)
        yield f"{program}: {found or 'none on the PATH, so runs with training.deepspeed cannot start'}"
