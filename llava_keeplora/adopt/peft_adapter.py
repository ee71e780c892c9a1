"""Reading of a plain PEFT LoRA adapter as deltas; what s · B A on linear layers cannot express is refused.

Legend: in / out features of a layer, r rank. ΔW = s B A with A (r, in), B (out, r), and s = alpha / r, or
alpha / √r for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_keeplora.adapters import Delta
from llava_keeplora.errors import RunError
from llava_keeplora.files import read_tensors
from llava_keeplora.records import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
AGAIN = "save or download the adapter again"
MERGE = "merge it into its base with PEFT's merge_and_unload, save that, and adopt the checkpoint"

#: Keys of `LoraConfig` that change neither ΔW nor which layers have one, as far as the tensors don't tell.
HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # PEFT ignores it for linear layers.
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
#: Initialisations that leave the base as it is; the others subtract something from it.
INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
#: Values that switch a key off.
OFF: tuple[Any, ...] = (None, False, "none", {}, [])


def read_adapter(folder: Path, layers: Mapping[str, nn.Linear]) -> dict[str, Delta]:
    """Read an adapter's update of every layer; layers whose B is zero are left out.

    Args:
        folder: the adapter's folder.
        layers: full name → linear layer of the model that it belongs to.

    Raises:
        RunError: a file is damaged or incomplete, the adapter is more than LoRA on linear layers, or it does
            not fit the model.
    """
    config = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise RunError(
            f"{folder} holds no {WEIGHTS}", "save the adapter as safetensors, with save_pretrained"
        )
    factors: dict[str, dict[str, Tensor]] = {}
    names = _by_canonical(layers)
    for key, value in read_tensors(path).items():
        match = KEY.fullmatch(key)
        if match is None:
            raise RunError(f"{path} holds the tensor '{key[:200]}', which is no linear layer's LoRA", MERGE)
        name = names.get(canonical(match["layer"]))
        if name is None:
            raise RunError(
                f"{path} adapts '{match['layer'][:200]}', which is no linear layer of the run's model",
                "adopt it into a run of the base that it was trained on",
            )
        if match["factor"] in factors.setdefault(name, {}):
            raise RunError(f"{path} holds lora_{match['factor']} of '{name}' twice", AGAIN)
        factors[name][match["factor"]] = value
    deltas = {
        name: _delta(path, name, tensors, layers[name], config)
        for name, tensors in sorted(factors.items())
        if _check_factors(path, name, tensors, layers[name])
    }
    if not any(bool(delta.B.any()) for delta in deltas.values()):
        raise RunError(f"{path} changes nothing: every B is zero", "train the adapter first")
    return {name: delta for name, delta in deltas.items() if bool(delta.B.any())}


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check `adapter_config.json`.

    Raises:
        RunError: it cannot be read, or sets something that s · B A cannot express.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise RunError(f"{folder} holds no {CONFIG}", AGAIN)
    config = read_object(path, AGAIN)
    if config.get("peft_type") != "LORA":
        raise RunError(f"{path} is of type {config.get('peft_type')!r}, and adopted are LoRA adapters", MERGE)
    for key, value in config.items():
        if key not in HARMLESS and value not in OFF:
            raise RunError(
                f"{path} sets {key} to {str(value)[:80]!r}, so that its update is more than s B A on linear "
                "layers",
                MERGE,
            )
    if (init := config.get("init_lora_weights", True)) not in INITS:
        raise RunError(
            f"{path} has init_lora_weights {str(init)[:80]!r}, which changed the base that it was trained on",
            "save it with PEFT's path_initial_model_for_weight_conversion, or " + MERGE,
        )
    numbers = [config.get("r"), config.get("lora_alpha"), *_pattern(path, config, "rank_pattern").values()]
    numbers += _pattern(path, config, "alpha_pattern").values()
    if not all(type(n) in (int, float) and 0 < n < math.inf for n in numbers):
        raise RunError(f"{path} has a rank or alpha that is no number above 0", AGAIN)
    return config


def _pattern(path: Path, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise RunError(f"{path} has a {key} that is no object", AGAIN)
    return pattern


def _check_factors(path: Path, name: str, tensors: Mapping[str, Tensor], layer: nn.Linear) -> bool:
    """Check that both factors are there, fit the layer, and hold finite numbers; return True.

    Raises:
        RunError: naming the layer.
    """
    if missing := {"A", "B"} - tensors.keys():
        raise RunError(f"{path} lacks lora_{min(missing)} of '{name}'", AGAIN)
    A, B = tensors["A"], tensors["B"]
    rank = A.shape[0] if A.dim() == 2 else 0
    if A.shape != (rank, layer.in_features) or B.shape != (layer.out_features, rank) or not rank:
        raise RunError(
            f"{path} has A of shape {tuple(A.shape)} and B of shape {tuple(B.shape)} for '{name}', which is "
            f"{layer.out_features} × {layer.in_features} in the run's model",
            "adopt it into a run of the base that it was trained on, or save it again from whole weights",
        )
    for factor, value in tensors.items():
        if not value.is_floating_point() or not torch.isfinite(value.float()).all():
            raise RunError(
                f"{path} has numbers in lora_{factor} of '{name}' that are not finite", "train it again"
            )
    return True


def _delta(
    path: Path, name: str, tensors: Mapping[str, Tensor], layer: nn.Linear, config: Mapping[str, Any]
) -> Delta:
    """Return a layer's update, with the scale that PEFT gives it."""
    from peft.utils.other import get_pattern_key

    rank, alpha = (
        pattern.get(get_pattern_key(pattern.keys(), name), config[default])
        for pattern, default in (
            (_pattern(path, config, "rank_pattern"), "r"),
            (_pattern(path, config, "alpha_pattern"), "lora_alpha"),
        )
    )
    if rank != tensors["A"].shape[0]:
        raise RunError(
            f"{path} has rank {tensors['A'].shape[0]} in '{name}', where {CONFIG} says {rank}", AGAIN
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Delta(tensors["A"].float(), tensors["B"].float(), float(scale))


def _by_canonical(names: Iterable[str]) -> dict[str, str]:
    """Return canonical name → name, without names that share one with another."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(canonical(name), []).append(name)
    return {key: same[0] for key, same in found.items() if len(same) == 1}


def canonical(name: str) -> str:
    """Return a layer's name without the containers that versions of transformers name differently.

    `language_model.model.layers.0` of version 4 is `model.language_model.layers.0` of version 5, and
    `vision_tower.vision_model.encoder` is `vision_tower.encoder`.
    """
    name = ".".join(part for part in name.split(".") if part != "model")
    return name.replace("vision_tower.vision_model.", "vision_tower.")
