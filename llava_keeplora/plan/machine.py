"""Memory of the machine that a run is planned for, and the check of it that every start makes."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_keeplora.adapters import is_quantised
from llava_keeplora.config import RunConfig, deepspeed_config, make_method
from llava_keeplora.deepspeed_zero import loaded_whole
from llava_keeplora.errors import ConfigError
from llava_keeplora.methods import Changed, check_method
from llava_keeplora.models import DTYPES, Family, open_model
from llava_keeplora.subspace import GradientSketch, sketch_width
from llava_keeplora_eval.checkpoints import loading

GB = 1e9
F32 = 4
#: Bytes that a process holds before it has a model: Python and its libraries; on a GPU, the CUDA context with
#: its libraries' workspace.
LIBRARIES, CONTEXT = 0.8e9, 0.6e9
#: Files with the memory limit of a group of processes (cgroup version 2, then 1): a container may have less
#: than the machine.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Machine:
    """Hardware that a run is planned for.

    Args:
        gpus: number of GPUs; 0 for a run on the CPU.
        memory: bytes of each GPU, or of main memory for a run on the CPU.
    """

    gpus: int
    memory: int

    @property
    def available(self) -> int:
        """Bytes that are left for a run's tensors."""
        return round(self.memory - (CONTEXT if self.gpus else LIBRARIES))

    def __str__(self) -> str:
        each = f"{self.memory / GB:.1f} GB"
        return (
            f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} of {each}{' each' if self.gpus > 1 else ''}"
            if self.gpus
            else f"the CPU with {each}"
        )


def find_machine(gpus: int | None = None, gpu_memory_gb: float | None = None) -> Machine:
    """Return the machine to plan for.

    Args:
        gpus: number of GPUs; None for one GPU if `gpu_memory_gb` is given, else for the CPU of this machine.
        gpu_memory_gb: memory of each GPU, in 10⁹ bytes; that of this machine's first GPU when None.

    Raises:
        ConfigError: a number is not positive, or the memory of a GPU isn't given and this machine has none.
    """
    if gpus is None and gpu_memory_gb is None:
        return Machine(0, host_memory())
    gpus = 1 if gpus is None else gpus
    if gpus < 1:
        raise ConfigError(
            f"--gpus is {gpus}, but a plan for GPUs needs at least one", "leave it out to plan for the CPU"
        )
    if gpu_memory_gb is None:
        if not torch.cuda.is_available():
            raise ConfigError(
                "how much memory a GPU has is not known, because this machine has none",
                "give it in GB, for instance --gpu-memory 24",
            )
        return Machine(gpus, torch.cuda.get_device_properties(0).total_memory)
    if not 0 < gpu_memory_gb < math.inf:
        raise ConfigError(
            f"--gpu-memory is {gpu_memory_gb}, but a GPU has memory",
            "give it in GB, for instance --gpu-memory 24",
        )
    return Machine(gpus, round(gpu_memory_gb * GB))


def host_memory() -> int:
    """Return the bytes of this machine's memory, or of this container's where that is less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, LIMITS):
        text = path.read_text().strip() if path.is_file() else "max"
        sizes += [int(text)] if text.isdigit() else []
    return min(sizes)


def check_start(
    config: RunConfig, family: Family, memory: int | None = None, processes: int = 1
) -> dict[str, Changed]:
    """Refuse a run that cannot fit, whatever its data are; `llava-keeplora plan` estimates the rest.

    In every run the weights and the statistics of one pass are in memory at the same time; without a GPU, the
    copies of the weights that change are as well. A model that ZeRO-3 splits is not checked.

    Args:
        config: the run.
        family: its model, not loaded yet; it is given a skeleton.
        memory: bytes of the device; those of this machine when None.
        processes: number of the run's processes on this machine, which share its memory without a GPU.

    Returns:
        label → what its method changes, see `changed_layers`.

    Raises:
        ConfigError: the sum, or `memory.statistics_gb`, exceeds the device's memory.
    """
    gpu = torch.cuda.is_available()
    memory = memory or (
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if gpu else host_memory()
    )
    where = f"the {'GPU' if gpu else 'machine'} has {memory / GB:.1f} GB"
    sharing = 1 if gpu else processes
    if sharing > 1:
        memory //= sharing
        where += f", {memory / GB:.1f} for each of its {sharing} processes"
    if config.memory.statistics_gb * GB > memory:
        raise ConfigError(
            f"memory.statistics_gb is {config.memory.statistics_gb}, but {where}",
            f"set memory.statistics_gb={memory / GB / 4:.2g}, or less",
        )
    changed = changed_layers(config, family)
    deepspeed = deepspeed_config(config) or {}
    if deepspeed.get("zero_optimization", {}).get("stage") == 3:
        return changed
    least = _least(config, family, changed, gpu)
    if sum(least.values()) <= memory:
        return changed
    raise ConfigError(
        f"the run needs at least {sum(least.values()) / GB:.1f} GB "
        f"({', '.join(f'{what} {size / GB:.1f}' for what, size in least.items())}), but {where}",
        f"{_cure(config, gpu, memory, sharing)}; `llava-keeplora plan` says stage by stage what fits",
    )


def _cure(config: RunConfig, gpu: bool, memory: int, sharing: int) -> str:
    """Return the first of a few settings with which the run fits into a device's memory (bytes), as advice.

    Args:
        config: the run.
        gpu: whether it runs on a GPU.
        memory: bytes for one process.
        sharing: number of processes that share the device.
    """
    if config.model.object:
        return "take a smaller model or more memory"
    models = {
        "model.dtype=bfloat16": {"dtype": "bfloat16"},
        "model.quantization=nf4": {"quantization": "nf4"},
    }
    smaller = {
        f"methods.{label}.gradient=sketch": sketching(config, label)
        for label in config.methods
        if takes_whole_gradient(config, label)
    }
    smaller |= {
        name: dataclasses.replace(config, model=dataclasses.replace(config.model, **values))
        for name, values in models.items()
    }
    fewer = "fewer processes, " if sharing > 1 else ""
    return next(
        (f"set {name}" for name, other in smaller.items() if _fits(other, gpu, memory)),
        f"take {fewer}a smaller model or more memory",
    )


def changed_layers(config: RunConfig, family: Family) -> dict[str, Changed]:
    """Return label → what its method changes of the family's model, which is given a skeleton.

    Raises:
        ConfigError: see `check_method`.
        EvalError: no model can be built of its configuration.
    """
    with loaded_whole(), loading(family.path):
        family.skeleton(DTYPES[config.model.dtype])
    return {
        label: check_method(label, make_method(method), method.parts, family)
        for label, method in config.methods.items()
    }


def _fits(config: RunConfig, gpu: bool, memory: int) -> bool:
    family = open_model(config.model)
    return sum(_least(config, family, changed_layers(config, family), gpu).values()) <= memory


def _least(config: RunConfig, family: Family, changed: Mapping[str, Changed], gpu: bool) -> dict[str, int]:
    """Return what is in the device's memory at the same time in every run: description → bytes."""
    statistics = max(
        (_statistics_bytes(config, label, layers) for label, layers in changed.items()), default=0
    )
    copies = {} if gpu else {"copies of the layers that change": kept_bytes(changed.values())}
    return {"the model": model_bytes(family.model), **copies, "statistics of a pass": statistics}


def _statistics_bytes(config: RunConfig, label: str, changed: Changed) -> int:
    """Return the bytes of the largest statistics of a method's passes, in their smallest form."""
    method = make_method(config.methods[label])
    per_example = sum(
        t.nbytes for s in method.gradient_statistics(changed.adapted).values() for t in s.tensors
    )
    return max(gradient_bytes(config, label, changed), method.least_statistics(changed.adapted), per_example)


def model_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, each counted once."""
    return sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def kept_bytes(changed: Iterable[Changed]) -> int:
    """Return the bytes of the base's weights that a run copies: those of unquantised layers that change.

    Args:
        changed: what each method changes.
    """
    modules = {name: module for layers in changed for name, module in layers.modules.items()}
    return sum(
        p.nbytes
        for module in modules.values()
        if not is_quantised(module)
        for p in module.parameters(recurse=False)
    )


def takes_whole_gradient(config: RunConfig, label: str) -> bool:
    """Return whether a method holds whole gradients though sketches would do."""
    subspaces = make_method(config.methods[label]).subspace_plan()
    return subspaces is not None and subspaces.may_sketch


def sketching(config: RunConfig, label: str) -> RunConfig:
    """Return the run's configuration with a method's gradients held as sketches."""
    method = config.methods[label]
    sketched = dataclasses.replace(method, options={**method.options, "gradient": "sketch"})
    return dataclasses.replace(config, methods={**config.methods, label: sketched})


def gradient_bytes(config: RunConfig, label: str, changed: Changed) -> int:
    """Return the bytes of what a method's first gradient pass sums up.

    For every layer this is a sketch where that is smaller, else the whole gradient.
    """
    subspaces, total = make_method(config.methods[label]).subspace_plan(), 0
    if subspaces is None or not subspaces.first_gradient:
        return 0
    for layer in changed.adapted.values():
        out_dim, in_dim = layer.module.out_features, layer.module.in_features
        width = sketch_width(layer.rank)
        sketched = subspaces.sketched and GradientSketch.is_worth_it(out_dim, in_dim, width)
        total += F32 * (GradientSketch.numbers(out_dim, in_dim, width) if sketched else out_dim * in_dim)
    return total
