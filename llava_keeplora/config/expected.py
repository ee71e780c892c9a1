"""The published figures with which `llava-keeplora reproduce` compares a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora_eval.aggregates import AGGREGATES


@dataclass(frozen=True)
class ExpectedConfig:
    """Configuration of the published figures of one row of the table, in percent.

    `llava-keeplora reproduce` compares a run with them; training ignores them.

    Args:
        source: where they were published, and known differences.
        tolerance: the largest accepted difference of a reproduction, in percentage points.
        tolerance_from: where the tolerance comes from: the spread of seeds, others' reproductions, neither.
        tolerances: figure, an aggregate or a task → its tolerance, where it has another one.
        figures: aggregate → figure, for instance `transfer`; see `llava_keeplora_eval.aggregates`.
        last: task → its score after the last task.
        model: the base model that they were measured on; the configuration's when null.
        sequence: the sequence, by name or file, with whose tasks they were measured; the run's own when null.
        test_prompts: as under `evaluation`, with which they were measured; the row's when null.
        seeds: number of seeds whose mean they are; null where it was not published.
        not_comparable: why no run compares with them, for instance `the whole model is trained there`. The
            row may then be of a method that the run does not have.
        not_comparable_figures: figure, an aggregate or a task → why no run compares with it, where runs
            compare with the row's others, for instance `a user's run is 25 points below it`.
    """

    source: str = ""
    tolerance: float = 1.0
    tolerance_from: str = ""
    tolerances: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    model: str | None = None
    sequence: str | None = None
    test_prompts: str | None = None
    seeds: int | None = None
    not_comparable: str | None = None
    not_comparable_figures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError(
                "source is missing, but expected figures must have one", "name the paper and the table"
            )
        for name in self.figures:
            if name not in AGGREGATES:
                raise ConfigError(
                    f"figures names '{name}', which is not an aggregate", nearest(str(name), AGGREGATES)
                )
        for key in ("tolerances", "not_comparable_figures"):
            for name in getattr(self, key):
                if name not in dict(self.published()):
                    raise ConfigError(
                        f"{key} names '{name}', of which there is no figure",
                        nearest(str(name), dict(self.published())),
                    )
        for name, reason in self.not_comparable_figures.items():
            if not isinstance(reason, str) or not reason:
                raise ConfigError(
                    f"not_comparable_figures must say why (got {reason!r} for '{name}')",
                    "write the reason as a clause",
                )
        for name, value in [*self.published(), *self.tolerances.items()]:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(
                    f"figures, last and tolerances must hold finite numbers (got {value!r} for '{name}')",
                    "write percents",
                )
        for tolerance in (self.tolerance, *self.tolerances.values()):
            if not tolerance > 0:
                raise ConfigError(
                    f"tolerance must be above 0, as published figures are rounded (got {tolerance})",
                    "set it to, say, 1.0",
                )
        if self.seeds is not None and self.seeds < 1:
            raise ConfigError(
                f"seeds must be at least 1 (got {self.seeds})", "leave it out where it was not published"
            )

    def published(self) -> Iterator[tuple[str, float]]:
        """Yield (aggregate, or task whose last score it is; figure)."""
        yield from self.figures.items()
        yield from self.last.items()
