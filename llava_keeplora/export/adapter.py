"""Export of the learned deltas as one ordinary PEFT LoRA adapter of the original base.

All layers have one rank, alpha equals it, and targets are leaf names, because vLLM reads neither patterns of
ranks nor regular expressions. Layers of a smaller rank are padded with zeros, and the deltas' scales are
multiplied into B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import peft
from safetensors import safe_open
from torch import nn

from llava_keeplora.adapters import (
    Delta,
    FullDelta,
    compress,
    concatenate,
    pad,
    relative_error,
    singular_values,
)
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.export.loaded_run import Base
from llava_keeplora.files import write_json, write_tensors

WEIGHTS = "adapter_model.safetensors"
#: The values that vLLM's `--max-lora-rank` accepts.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: Relative error of an update up to which it counts as held exactly; rounding A and B to fp32 gives 1e-7.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Combined:
    """Sum of several tasks' deltas: one delta per layer, all of one rank.

    Args:
        layers: layer's name → delta of scale 1.
        rank: rank of each delta, padding included.
        error: relative error ‖ΔW − ΔW_k‖ / ‖ΔW‖ over all layers; 0 if nothing was compressed.
        losses: the same for every layer that was compressed.
    """

    layers: dict[str, Delta]
    rank: int
    error: float = 0.0
    losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The relative error of the layer where it is largest."""
        return max(self.losses.values(), default=0.0)


def combine(
    tasks: Sequence[Mapping[str, Delta | FullDelta]], rank: int | None = None, width: int | None = None
) -> Combined:
    """Sum the tasks' deltas into one adapter, exactly unless a rank is given.

    Args:
        tasks: each task's deltas, by the layers' names.
        rank: the rank to compress to (truncated SVD of every layer's sum of a higher one); exact when None.
        width: the rank that every delta is padded to; the largest that is needed when None.

    Raises:
        ConfigError: a layer was trained in full, the rank is below 1, or there is nothing to combine.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank is {rank}, but an adapter has at least one direction", "give 1 or more")
    layers, losses = _summed(tasks), {}
    lost = whole = 0.0
    for name, delta in layers.items():
        if rank is not None and len(delta.A) > rank:
            layers[name], S = compress(delta, rank)
            losses[name] = relative_error(S, rank)
            lost += float(S[rank:].square().sum())
            whole += float(S.square().sum())
        elif rank is not None:
            whole += float(singular_values(delta).square().sum())
    width = width or max(len(delta.A) for delta in layers.values())
    padded = {name: pad(delta, width) for name, delta in layers.items()}
    return Combined(padded, width, math.sqrt(lost / whole) if lost else 0.0, losses)


def smallest_rank(tasks: Sequence[Mapping[str, Delta | FullDelta]], loss: float = 0.0) -> int:
    """Return the smallest rank of `VLLM_RANKS` at which no layer loses more than a share of its update.

    Args:
        tasks: each task's deltas, by the layers' names.
        loss: the largest ‖ΔW − ΔW_k‖ / ‖ΔW‖ of a layer; 0 allows what rounding A and B to fp32 loses.

    Raises:
        ConfigError: a layer was trained in full, there is nothing to combine, or no rank is large enough.
    """
    values = {name: singular_values(delta) for name, delta in _summed(tasks).items()}
    worst = math.inf
    for rank in VLLM_RANKS:
        worst = max(relative_error(S, rank) for S in values.values())
        if worst <= max(loss, ROUNDING):
            return rank
    raise ConfigError(
        f"rank {VLLM_RANKS[-1]}, the largest that vLLM loads, loses {worst:.2g} of a layer's update, and "
        f"--loss allows {loss:g}",
        f"allow more with --loss {math.ceil(worst * 1e4) / 1e4:g}, or export fewer tasks with --at-task",
    )


def _summed(tasks: Sequence[Mapping[str, Delta | FullDelta]]) -> dict[str, Delta]:
    """Return every layer's exact sum of deltas; refuse what no LoRA represents, and an empty sum."""
    full = sorted({name for task in tasks for name, delta in task.items() if isinstance(delta, FullDelta)})
    if full:
        # PEFT's `modules_to_save` could hold these layers, but vLLM refuses an adapter that has any.
        adapted = any(isinstance(delta, Delta) for task in tasks for delta in task.values())
        raise ConfigError(
            f"{len(full)} layers have updates of full rank, which no LoRA adapter holds exactly "
            f"(first {full[0]})",
            "leave their part out with --parts, or export --as merged" if adapted else "export --as merged",
        )
    layers = concatenate(tasks)
    if not layers:
        raise ConfigError("the chosen parts hold no trained layer", "choose others with --parts")
    return layers


def write_adapter(
    folder: Path, combined: Combined, model: nn.Module, parts: Mapping[str, str], base: Base
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, and check the tensors as written.

    Args:
        folder: the folder to write to.
        combined: the adapter.
        model: the base, for the names of its other layers.
        parts: part → dotted prefix of its layers.
        base: the base's id and revision, which the configuration names.

    Raises:
        RunError: a layer's B is zero, or a tensor is empty.
    """
    targets = sorted({_leaf(name) for name in combined.layers})
    others = [
        name for name, _ in model.named_modules() if _leaf(name) in targets and name not in combined.layers
    ]
    write_json(
        folder / "adapter_config.json",
        {
            # Only settings that matter: the others are at the defaults of whichever PEFT version loads them.
            "peft_type": "LORA",
            "peft_version": peft.__version__,
            "auto_mapping": {
                "base_model_class": type(model).__name__,
                "parent_library": type(model).__module__,
            },
            "base_model_name_or_path": base.id,
            "revision": base.revision,
            "task_type": None,
            "inference_mode": True,
            "r": combined.rank,
            "lora_alpha": combined.rank,
            "lora_dropout": 0.0,
            "target_modules": targets,
            "exclude_modules": exclusion(others, [*others, *combined.layers], parts),
            "bias": "none",
            "modules_to_save": None,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
        },
    )
    tensors = {
        f"base_model.model.{name}.lora_{key}.weight": value
        for name, delta in combined.layers.items()
        for key, value in delta.tensors.items()
    }
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    check_weights(folder / WEIGHTS)


def check_weights(path: Path) -> None:
    """Refuse empty tensors and a B of zeros alone.

    Saving under ZeRO-3 leaves the former, a layer that never trained the latter.

    Raises:
        RunError: naming the first such tensor.
    """
    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            value = file.get_tensor(key)
            if value.numel() == 0:
                raise RunError(
                    f"'{key}' of {path.name} holds no numbers",
                    "export from the run folder itself, in one process",
                )
            if ".lora_B." in key and not value.any():
                raise RunError(
                    f"'{key}' of {path.name} is zero, so its layer learned nothing",
                    "leave its part out with --parts, or train it",
                )


def exclusion(others: Iterable[str], targeted: Iterable[str], parts: Mapping[str, str]) -> str | None:
    """Return a regular expression of the layers that have a target's leaf name and no adapter.

    Names of a part's containers differ between versions of transformers (`language_model.layers`,
    `language_model.model.layers`), so the expression leaves open what comes before the part's name and
    between it and the layer's.

    Args:
        others: full names of these layers.
        targeted: full names of all layers with a target's leaf name.
        parts: part → dotted prefix of its layers.

    Returns:
        the value for PEFT's `exclude_modules`; None if there are no such layers.
    """
    others, targeted, pieces = list(others), list(targeted), []
    for prefix in parts.values():
        excluded = [name for name in others if name.startswith(f"{prefix}.")]
        marker = re.escape(prefix.removeprefix("model.").split(".")[0])
        whole_part = len(excluded) == sum(name.startswith(f"{prefix}.") for name in targeted)
        if excluded:
            pieces += (
                [rf"{marker}\..*"]
                if whole_part
                else [rf"{marker}(?:\..*)?{re.escape(name.removeprefix(prefix))}" for name in excluded]
            )
    pieces += [
        re.escape(name.removeprefix("model."))
        for name in others
        if not name.startswith(tuple(f"{p}." for p in parts.values()))
    ]
    return rf"(?:.*\.)?(?:{'|'.join(pieces)})" if pieces else None


def vllm_rank(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` with which vLLM loads an adapter; None above the largest."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]
