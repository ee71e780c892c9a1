"""Which layers a method changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llava_keeplora.errors import ConfigError
from llava_keeplora.methods.base import Layer


@dataclass(frozen=True)
class Changed:
    """The layers that a method changes.

    Args:
        adapted: name → layer with an adapter.
        full: name → linear layer that is trained itself.
        unreachable: names of layers that were asked for and that the loss cannot reach.
    """

    adapted: dict[str, Layer] = field(default_factory=dict)
    full: dict[str, nn.Linear] = field(default_factory=dict)
    unreachable: list[str] = field(default_factory=list)

    @property
    def modules(self) -> dict[str, nn.Linear]:
        """All of them that are changed, by full name."""
        return {name: layer.module for name, layer in self.adapted.items()} | self.full


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
        found.unreachable.extend(family.unreachable(part, targets))
        if own.train == "full":
            found.full.update(modules)
            continue
        for name, module in modules.items():
            found.adapted[name] = Layer(name, part, module, own.rank, own.alpha, own.energy("energy_weight"), own.energy("energy_feature"), own.auto)
    if not found.adapted:
        raise ConfigError("the run adapts no part of the model", f"name at least one of {', '.join(family.targets)} under `parts`")
    return found
