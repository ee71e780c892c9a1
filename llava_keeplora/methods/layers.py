"""The layers that a method changes, and checks of its settings against the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.methods.base import Layer, Method
from llava_keeplora.subspace import RankError, SubspaceError, guaranteed_room


@dataclass(frozen=True)
class Changed:
    """The modules of a model that a method changes.

    Args:
        adapted: name → layer with an adapter.
        full: name → module whose own parameters are trained in full.
        unreachable: names of targeted layers that get no gradient from the loss and are left out.
    """

    adapted: dict[str, Layer] = field(default_factory=dict)
    full: dict[str, nn.Module] = field(default_factory=dict)
    unreachable: list[str] = field(default_factory=list)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All changed modules, by full name."""
        return {name: layer.module for name, layer in self.adapted.items()} | self.full


def check_method(label: str, method: Method, parts: Mapping[str, Any], family: Any) -> Changed:
    """Check that a method can run on a model with these settings, whatever the data are.

    Args:
        label: the method's label in the configuration.
        method: the method.
        parts, family: see `find_layers`.

    Returns:
        the modules that it changes.

    Raises:
        ConfigError, MethodError: naming the label or the setting.
    """
    _check_family(label, method, family)
    _check_full_parts(parts, family)
    if method.every_position and (why := family.unsupported.get("every_position")):
        raise ConfigError(
            f"'{label}' {why}, and the text encoder of {family.path}, a {model_type(family)}, attends to it",
            f"give methods.{label} another preset",
        )
    if method.keeps_features and (why := family.unsupported.get("keeps_features")):
        raise ConfigError(
            f"'{label}' keeps image features, and {family.path}, a {model_type(family)}, {why}",
            f"set distillation to 0 in methods.{label}",
        )
    changed = find_changed(type(method), parts, family)
    method.check(changed.adapted)
    return changed


def find_changed(method: type[Method], parts: Mapping[str, Any], family: Any) -> Changed:
    """Return the modules of a model that a method changes.

    These are layers of the parts, the whole model, or none for a method that only adds modules of its own.

    Args:
        method: the method's class.
        parts, family: see `find_layers`.
    """
    if method.full_finetuning:
        # Not the root module's own parameters: in CLIP that is the temperature, which stays fixed.
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
    """Return the layers of a model that the parts of a configuration target.

    Args:
        parts: part → `llava_keeplora.config.PartConfig`.
        family: `llava_keeplora.models.Family`, with a model.

    Raises:
        ConfigError: if the model lacks a part or target, or nothing is adapted.
    """
    changed = Changed()
    for part, settings in parts.items():
        targets = settings.targets or family.targets.get(part, ())
        modules = family.linear_layers(part, targets)
        changed.unreachable.extend(family.layers_without_gradient(part, targets))
        if settings.train == "full":
            changed.full.update(modules)
            continue
        for name, module in modules.items():
            changed.adapted[name] = Layer(
                name,
                part,
                module,
                settings.rank,
                settings.alpha,
                settings.energy("energy_weight"),
                settings.energy("energy_feature"),
                settings.auto,
            )
    if not changed.adapted:
        raise ConfigError(
            "the run adapts no part of the model",
            f"name at least one of {', '.join(family.targets)} under `parts`",
        )
    return changed


def unsure_layers(layers: Iterable[Layer]) -> list[Layer]:
    """Return the layers whose rank may exceed the directions that a principal subspace leaves free.

    Where ε_w is `auto`, it is chosen so that the rank fits.
    """
    return [
        layer
        for layer in layers
        if "energy_weight" not in layer.auto
        and layer.rank
        > guaranteed_room(layer.module.out_features, layer.module.in_features, layer.energy_weight)
    ]


def model_type(family: Any) -> str:
    """Return the model type that a family's configuration names, else the family's own name."""
    return getattr(getattr(family, "config", None), "model_type", family.name)


def _check_family(label: str, method: Method, family: Any) -> None:
    """Check that the method runs on this family of models with its settings.

    Raises:
        ConfigError: naming both.
    """
    if family.name not in method.info.families:
        # With other settings it may run there, as a router that asks the model may be another one.
        others = family.name in type(method).info.families
        raise ConfigError(
            f"'{label}'{_settings(method) if others else ''} runs on the family "
            f"{' and '.join(method.info.families)}, but {family.path} is a {model_type(family)}, "
            f"of the family {family.name}",
            f"{'change these settings, or ' if others else ''}leave '{label}' out of this run",
        )
    types = method.info.model_types
    if types and model_type(family) not in types:
        raise ConfigError(
            f"'{label}' changes layers as they are in models of the type {' and '.join(types)}, but "
            f"{family.path} is a {model_type(family)}",
            f"leave '{label}' out of this run",
        )


def _settings(method: Method) -> str:
    """Return a method's settings that are not the default, as an addition to its name."""
    changed = [
        f"{setting.name} {value!r}"
        for setting in fields(method.options)
        if (value := getattr(method.options, setting.name)) != setting.default
    ]
    return f" with {' and '.join(changed)}" if changed else ""


def _check_full_parts(parts: Mapping[str, Any], family: Any) -> None:
    """Check that no part that is trained in full has quantised weights.

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


class in_layer:
    """Context that turns an error of `llava_keeplora.subspace` into a MethodError that names the layer."""

    def __init__(self, layer: Layer):
        self.layer = layer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, SubspaceError) and not isinstance(error, RankError):
            raise MethodError(
                f"in layer {self.layer.name}: {str(error).rstrip('.')}",
                "check the model's weights, the data and the thresholds",
            ) from error
