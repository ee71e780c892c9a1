"""Configuration of how one part of the model is adapted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llava_keeplora.errors import ConfigError

#: As in PEFT: every linear layer, here of a part.
ALL_LINEAR = "all-linear"

#: Value of a threshold that a run chooses from the data.
AUTO = "auto"

#: Thresholds that can be `auto` → the upper bound of the choice.
AUTO_LIMITS = {"energy_weight": 0.95, "energy_feature": 0.99}


@dataclass(frozen=True)
class PartConfig:
    """Configuration of how one part of the model is adapted; a part that is not named is frozen.

    The parts of CLIP are `vision` and `text`, those of LLaVA `vision`, `connector` and `language`.

    Args:
        targets: last parts of the linear layers' names, for instance `q_proj`, or `all-linear` for every
            linear layer of the part, as in PEFT; the model family's default when None.
        train: `adapter`, or `full` to train weight and bias themselves, without protection, as LLaVA's
            recipes train the connector.
        rank: r, the rank of each task's delta.
        alpha: the scale of a delta is alpha / rank.
        energy_weight: ε_w in (0, 1], the fraction of each weight's energy that is protected; `auto` chooses
            it, see docs/analysis.md.
        energy_feature: ε_f in (0, 1], the fraction of each task's feature energy that is protected; `auto`
            gives each task a budget of directions.
        learning_rate: learning rate of this part; `training.learning_rate` when None.
    """

    targets: tuple[str, ...] | str | None = None
    train: str = "adapter"
    rank: int = 16
    alpha: float = 16.0
    energy_weight: float | str = 0.85
    energy_feature: float | str = 0.99
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.train not in ("adapter", "full"):
            raise ConfigError(
                f"train must be 'adapter' or 'full' (got '{self.train}')",
                "set it to one of these, or leave the part out to freeze it",
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(
                f"learning_rate must be above 0 (got {self.learning_rate})",
                "leave the part out to freeze it",
            )
        for name in ("energy_weight", "energy_feature"):
            value = getattr(self, name)
            if isinstance(value, str) and value != AUTO:
                raise ConfigError(
                    f"{name} must be a number in (0, 1] or 'auto' (got '{value}')",
                    "set it to a fraction of energy such as 0.85, or to 'auto'",
                )
            if value != AUTO and not 0.0 < value <= 1.0:
                raise ConfigError(
                    f"{name} must be in (0, 1] (got {value})",
                    f"set it to a value such as 0.85; to protect nothing, use the method's "
                    f"{'protect_weights' if name == 'energy_weight' else 'protect_features'}: false",
                )
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1 (got {self.rank})", "set it to 1 or more")
        if not self.alpha > 0:
            raise ConfigError(
                f"alpha must be above 0, as must the scale alpha / rank (got {self.alpha})",
                "set alpha to the rank for a scale of 1",
            )
        object.__setattr__(self, "targets", _read_targets(self.targets))

    @property
    def auto(self) -> tuple[str, ...]:
        """Names of the thresholds that are `auto`."""
        return tuple(name for name in AUTO_LIMITS if getattr(self, name) == AUTO)

    def energy(self, name: str) -> float:
        """Return a threshold as a number; for one that is `auto`, its upper bound.

        Args:
            name: `energy_weight` or `energy_feature`.
        """
        return AUTO_LIMITS[name] if name in self.auto else getattr(self, name)


def _read_targets(targets: Any) -> tuple[str, ...] | None:
    """Return targets as a tuple of names; a configuration may list them, or give one name or `all-linear`.

    PEFT would read any other text as a pattern for whole module names. Such patterns are refused here, since
    they would apply to all parts.

    Raises:
        ConfigError: for a pattern, a name with a path, or an empty list.
    """
    if targets is None:
        return None
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    if not names:
        raise ConfigError(
            "targets is empty, so nothing would be adapted", "name at least one layer or leave the part out"
        )
    for name in names:
        if not isinstance(name, str) or not (name == ALL_LINEAR or re.fullmatch(r"\w+", name)):
            raise ConfigError(
                f"targets names {name!r}, but a target is the last part of a layer's name, such as q_proj, "
                "and no path or pattern",
                f"list such names, or write {ALL_LINEAR} for every linear layer of the part",
            )
    if ALL_LINEAR in names and len(names) > 1:
        raise ConfigError(
            f"targets lists {ALL_LINEAR} as well as {', '.join(n for n in names if n != ALL_LINEAR)}, which "
            "it includes already",
            f"write {ALL_LINEAR} alone",
        )
    return names
