"""The layers that a memory protects: linear layers of any model, named as by PEFT's `target_modules`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from llava_keeplora.config import ALL_LINEAR, AUTO, PartConfig
from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora.methods import Layer

#: Part of the layers when a memory has one set of settings for all.
WHOLE = "model"
#: Keys of a part's settings that a memory takes; the others are the driver's.
SETTINGS = ("targets", "rank", "alpha", "energy_weight", "energy_feature")

Targets = str | Sequence[str] | Mapping[str, Mapping[str, Any]]


def part_settings(targets: Targets, defaults: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return part → its settings, each with all keys of `SETTINGS`.

    Args:
        targets: names of layers for the part `WHOLE`, or part → its own settings, of which `targets` is
            required and the others replace the defaults.
        defaults: rank, alpha, energy_weight and energy_feature; an alpha of None is the part's rank.

    Raises:
        ConfigError: for an unknown key, a part without targets, or a value out of its range.
    """
    given = targets if isinstance(targets, Mapping) else {WHOLE: {"targets": targets}}
    parts: dict[str, dict[str, Any]] = {}
    for name, settings in given.items():
        if not isinstance(settings, Mapping) or "targets" not in settings:
            raise ConfigError(
                f"the part '{name}' names no layers (got {settings!r})",
                "write {'targets': ['q_proj', 'v_proj'], 'rank': 16}",
            )
        if unknown := set(settings) - set(SETTINGS):
            key = min(unknown)
            raise ConfigError(f"the part '{name}' has no setting '{key}'", nearest(key, SETTINGS))
        part = {**defaults, **settings}
        if part["alpha"] is None:
            part["alpha"] = float(part["rank"])
        if not isinstance(part["targets"], str):
            part["targets"] = list(part["targets"])
        for key in ("energy_weight", "energy_feature"):
            if part[key] == AUTO:
                raise ConfigError(
                    f"{key} of the part '{name}' is 'auto', which takes all tasks of a run to choose",
                    "set a number such as 0.85, or use a run's configuration",
                )
        PartConfig(**{key: part[key] for key in SETTINGS[1:]})  # Checks the ranges.
        parts[name] = part
    return parts


def find_target_layers(model: nn.Module, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Layer]:
    """Return full name → layer, in the model's order, of every linear layer that a part targets.

    As in PEFT, a list holds full names or their last components (`q_proj`, `mlp.fc1`), a text is a regular
    expression for the full name, and `all-linear` is every linear layer but the output embeddings.

    Args:
        model: the plain model.
        parts: see `part_settings`.

    Raises:
        ConfigError: if a target matches nothing or a module that is not a linear layer, or if two parts
            target the same layer.
    """
    of_layer: dict[str, str] = {}
    for part, settings in parts.items():
        for name in _matches(model, part, settings["targets"]):
            if of_layer.setdefault(name, part) != part:
                raise ConfigError(
                    f"layer {name} is a target of the parts '{of_layer[name]}' and '{part}'",
                    "name every layer in one part",
                )
    return {
        name: Layer(
            name,
            of_layer[name],
            module,
            *(parts[of_layer[name]][key] for key in SETTINGS[1:]),
        )
        for name, module in model.named_modules()
        if name in of_layer
    }


def _matches(model: nn.Module, part: str, targets: str | Sequence[str]) -> list[str]:
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if targets == ALL_LINEAR or list(targets) == [ALL_LINEAR]:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        names = [name for name in linear if modules[name] is not output]
        if not names:
            raise ConfigError("the model has no linear layer to adapt", "name a model with nn.Linear layers")
        return names
    patterns = [targets] if isinstance(targets, str) else list(targets)
    names = []
    for target in patterns:
        if isinstance(targets, str):
            matched = [name for name in modules if re.fullmatch(target, name)]
        else:
            matched = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not matched:
            leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ConfigError(
                f"the target '{target}' of the part '{part}' matches no module of the model",
                nearest(target, leaves),
            )
        for name in matched:
            if not isinstance(modules[name], nn.Linear):
                raise ConfigError(
                    f"the target '{target}' of the part '{part}' matches {name}, which is a "
                    f"{type(modules[name]).__name__} and not a linear layer",
                    "name nn.Linear layers, or 'all-linear' for all of them",
                )
        names += matched
    return list(dict.fromkeys(names))
