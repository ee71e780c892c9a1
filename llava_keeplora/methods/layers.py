"""Which layers a method changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llava_keeplora.errors import ConfigError
from llava_keeplora.methods.base import Layer, Method


@dataclass(frozen=True)
class Changed:
    """What a method changes of a model.

    Args:
        adapted: name → layer with an adapter.
        full: name → module whose own parameters are trained themselves.
        unreachable: names of layers that were asked for and that the loss cannot reach.
    """

    adapted: dict[str, Layer] = field(default_factory=dict)
    full: dict[str, nn.Module] = field(default_factory=dict)
    unreachable: list[str] = field(default_factory=list)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All of them that are changed, by full name."""
        return {name: layer.module for name, layer in self.adapted.items()} | self.full


def check_method(label: str, method: Method, parts: Mapping[str, Any], family: Any) -> Changed:
    """Refuse a method that cannot run on a model with these settings, whatever the data are.

    What it changes if it can.

    Args:
        label: of the method.
        method: the method.
        parts, family: see `find_layers`.

    Raises:
        ConfigError, MethodError: naming the label or the setting.
    """
    _check_family(label, type(method), family)
    _check_full_parts(parts, family)
    if method.every_position and (why := family.unsupported.get("every_position")):
        raise ConfigError(
            f"'{label}' {why}, and the text encoder of {family.path}, a {model_type(family)}, attends to it",
            f"give methods.{label} another preset",
        )
    changed = find_changed(type(method), parts, family)
    method.check(changed.adapted)
    return changed


def find_changed(method: type[Method], parts: Mapping[str, Any], family: Any) -> Changed:
    """What a method changes of a model.

    Layers of its parts, the whole of it, or nothing but modules of the method's own.

    Args:
        method: the method.
        parts, family: see `find_layers`.
    """
    if method.full_finetuning:
        # The root's own parameters stay as they are: of CLIP that is the temperature, which its fine-tuning
        # leaves alone.
        named = [(name, module) for name, module in family.model.named_modules() if name]
        return Changed(
            full={
                name: module
                for name, module in named
                if next(module.parameters(recurse=False), None) is not None
            }
        )
    return find_layers(parts, family) if method.uses_lora else Changed()


def find_layers(parts: Mapping[str, Any], family: Any) -> Changed:
    """The layers of a model that a method changes.

    Args:
        parts: part → `llava_keeplora.config.PartConfig`.
        family: `llava_keeplora.models.Family`, with a model.

    Raises:
        ConfigError: for parts or targets that the model doesn't have, or if nothing is adapted.
    """
    found = Changed()
    for part, own in parts.items():
        targets = own.targets or family.targets.get(part, ())
        modules = family.linear_layers(part, targets)
        found.unreachable.extend(family.layers_without_gradient(part, targets))
        if own.train == "full":
            found.full.update(modules)
            continue
        for name, module in modules.items():
            found.adapted[name] = Layer(
                name,
                part,
                module,
                own.rank,
                own.alpha,
                own.energy("energy_weight"),
                own.energy("energy_feature"),
                own.auto,
            )
    if not found.adapted:
        raise ConfigError(
            "the run adapts no part of the model",
            f"name at least one of {', '.join(family.targets)} under `parts`",
        )
    return found


def model_type(family: Any) -> str:
    """Return the model type that a family's configuration names, else the family's own name."""
    return getattr(getattr(family, "config", None), "model_type", family.name)


def _check_family(label: str, method: type[Method], family: Any) -> None:
    """Refuse a model that a method does not run on.

    Raises:
        ConfigError: naming both.
    """
    if family.name not in method.info.families:
        raise ConfigError(
            f"'{label}' runs on {' and '.join(method.info.families)}, and {family.path} is a {family.name}",
            f"leave '{label}' out of this run",
        )
    types = method.info.model_types
    if types and model_type(family) not in types:
        raise ConfigError(
            f"'{label}' changes layers as they are in models of the type {' and '.join(types)}, and "
            f"{family.path} is a {model_type(family)}",
            f"leave '{label}' out of this run",
        )


def _check_full_parts(parts: Mapping[str, Any], family: Any) -> None:
    """Refuse to train a part in full whose weights are kept in a quantised form.

    Raises:
        ConfigError: naming the part.
    """
    for name, part in parts.items():
        if part.train != "full" or not family.quantization:
            continue
        layers = family.linear_layers(name, part.targets or family.targets.get(name, ()))
        if not all(
            layer.startswith(tuple(f"{prefix}." for prefix in family.skip_quantization)) for layer in layers
        ):
            raise ConfigError(
                f"parts.{name}.train is 'full' and model.quantization is {family.quantization}, but "
                "quantised weights can't be trained",
                f"set parts.{name}.train to 'adapter', or leave the base unquantised",
            )
