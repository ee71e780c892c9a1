"""Checks of the machine: libraries, devices, memory, disk space, and programs that libraries need."""

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
from llava_keeplora.precision import cpu_multiplies_bfloat16
from llava_keeplora_eval.java import METEOR, find_jar

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


def examine_machine() -> Iterator[str | UserError]:
    """Yield a line for each check of the machine; an error for what must be repaired before a run."""
    # It imports the models, which the check of a run's files does not need.
    from llava_keeplora.plan.machine import GB

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
    yield _check_version(
        "python", platform.python_version(), needed, "make the environment anew with a newer Python"
    )
    for text in metadata.requires("llava-keeplora") or ():
        requirement = Requirement(text)
        cure = f"install it: pip install '{requirement.name}{requirement.specifier}'"
        if requirement.marker is not None:  # It belongs to an optional extra.
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield RunError(f"{requirement.name} is not installed", cure)
            continue
        yield _check_version(requirement.name, version, requirement.specifier, cure)


def _check_version(name: str, version: str, needed: SpecifierSet, cure: str) -> str | UserError:
    if needed.contains(version, prereleases=True):
        return f"{name} {version}"
    return RunError(f"{name} is {version}, and llava-keeplora needs {needed}", cure)


def _devices() -> Iterator[str]:
    from llava_keeplora.plan.machine import GB, host_memory  # see examine_machine

    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"GPU {index}: {device.name}, {device.total_memory / GB:.1f} GB"
    if not torch.cuda.is_available():
        yield "GPU: none, runs use the CPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bfloat16 = "" if cpu_multiplies_bfloat16() else ", slow in bfloat16: train in fp32"
    yield f"CPU: {cores} cores, {host_memory() / GB:.1f} GB of memory{bfloat16}"


def _programs() -> Iterator[str]:
    """Yield a line for each program that only some runs need, so that a missing one is no error."""
    yield (
        "Java: found, METEOR is scored"
        if find_jar(METEOR)
        else "Java: none, so captions are scored without METEOR"
    )
    for program, names in (("C++ compiler", (os.environ.get("CXX", "c++"), "g++")), ("ninja", ("ninja",))):
        executable = next((path for name in names if (path := shutil.which(name))), None)
        yield f"{program}: {executable or 'none on the PATH, so runs with training.deepspeed cannot start'}"
