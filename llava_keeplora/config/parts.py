"""How one part of the model is adapted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llava_keeplora.errors import ConfigError

#: PEFT's word for every linear layer; here of a part.
ALL_LINEAR = "all-linear"

#: What a threshold is that a run chooses from the data, and how far it may go.
AUTO = "auto"

AUTO_LIMITS = {"energy_weight": 0.95, "energy_feature": 0.99}


@dataclass(frozen=True)
class PartConfig:
    """How one part of the model is adapted: `vision` and `text` of CLIP.

    `vision`, `connector` and `language` of LLaVA.

    A part that is not named is frozen.

    Args:
        targets: leaf names of the linear layers, for instance `q_proj`, or `all-linear` for every linear
            layer of the part, as in PEFT; the model family's usual ones when None.
        train: `adapter`, or `full` to train weight and bias themselves, unprotected, as LLaVA's recipes train
            the connector.
        rank: r, the rank of each task's delta.
        alpha: the scale of a delta is alpha / rank.
        energy_weight: ε_w in (0, 1], the share of each weight's energy that is protected; `auto` chooses it,
            see docs/analysis.md.
        energy_feature: ε_f in (0, 1], the share of each task's feature energy that is protected; `auto` gives
            each task a budget of directions.
        learning_rate: of this part; `training.learning_rate` when None.
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
                f"train is '{self.train}'",
                "set it to 'adapter' or 'full', or leave the part out to freeze it",
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(
                f"learning_rate is {self.learning_rate}, but a part that is named is trained",
                "leave the part out to freeze it",
            )
        for name in ("energy_weight", "energy_feature"):
            value = getattr(self, name)
            if isinstance(value, str) and value != AUTO:
                raise ConfigError(
                    f"{name} is '{value}'", "set it to a share of energy such as 0.85, or to 'auto'"
                )
            if value != AUTO and not 0.0 < value <= 1.0:
                raise ConfigError(
                    f"{name} is {value}, but a share of energy lies in (0, 1]",
                    f"set it to a value such as 0.85; to protect nothing, use the method's "
                    f"{'protect_weights' if name == 'energy_weight' else 'protect_features'}: false",
                )
        if self.rank < 1:
            raise ConfigError(
                f"rank is {self.rank}, but an adapter needs at least one direction", "set rank to 1 or more"
            )
        if not self.alpha > 0:
            raise ConfigError(
                f"alpha is {self.alpha}, but the scale alpha / rank must be above zero",
                "set alpha to the rank for a scale of 1",
            )
        object.__setattr__(self, "targets", _read_targets(self.targets))

    @property
    def auto(self) -> tuple[str, ...]:
        """Which of the two thresholds are `auto`."""
        return tuple(name for name in AUTO_LIMITS if getattr(self, name) == AUTO)

    def energy(self, name: str) -> float:
        """A threshold as a number: of one that is `auto`, how far it may go.

        Args:
            name: `energy_weight` or `energy_feature`.
        """
        return AUTO_LIMITS[name] if name in self.auto else getattr(self, name)


def _read_targets(targets: Any) -> tuple[str, ...] | None:
    """Leaf names as a list, whether a configuration lists them, names one, or writes PEFT's `all-linear`.

    PEFT reads any other text as a pattern for whole module names, which would be one for all parts; parts are
    named here.

    Raises:
        ConfigError: for a pattern, a name with a path, or nothing.
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
            f"targets lists {ALL_LINEAR} beside {', '.join(n for n in names if n != ALL_LINEAR)}, which it "
            "holds already",
            f"write {ALL_LINEAR} alone",
        )
    return names
