"""The records of a run's guard: what it watches, the limits, and what happens to a task that breaks one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from llava_keeplora.coerce import build
from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora.run_folder import ROLLBACK, SHRINK, STOP, WARN

ON_FAILURE = (ROLLBACK, SHRINK, STOP, WARN)


@dataclass(frozen=True)
class WatchConfig:
    """A recipe that the guard scores after every task, and that no method is trained on.

    Args:
        task: a shipped recipe or a YAML file; its split `test` is answered.
        examples: how many of its examples are answered at most, chosen by their ids, those that the metric
            scores together as a whole; all when None.
    """

    task: str = ""
    examples: int | None = None

    def __post_init__(self) -> None:
        if not self.task:
            raise ConfigError("task is missing, which names the recipe to watch", "name a recipe or a YAML")
        if self.examples is not None and self.examples < 1:
            raise ConfigError(f"examples must be at least 1 (got {self.examples})", "leave it out for all")


@dataclass(frozen=True)
class DropLimit:
    """The largest accepted drop of a score from before a task to after it.

    Args:
        max_drop: in percentage points; no limit when None.
    """

    max_drop: float | None = None

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise ConfigError(
                f"max_drop must be 0 or more percentage points (got {self.max_drop})", "set it to, say, 2.0"
            )

    @property
    def least(self) -> float | None:
        """The least accepted change, in percentage points; None for no limit."""
        return None if self.max_drop is None else 0.0 - self.max_drop  # Never -0.0.


@dataclass(frozen=True)
class GainLimit:
    """The least accepted gain of a new task's own score.

    Args:
        min_gain: in percentage points; no limit when None.
    """

    min_gain: float | None = None


@dataclass(frozen=True)
class GuardConfig:
    """Configuration of the guard, which judges every task; see docs/guard.md.

    Args:
        watch: recipes that are scored after every task: names, files, or mappings with `task` and `examples`.
        old_tasks: limit for each task learned before.
        watch_tasks: limit for each recipe of `watch`.
        new_task: limit for the task that was just learned.
        confidence: of all limits of a task together.
        on_failure: what happens after a task that breaks a limit: `rollback` to the task before, `shrink` its
            update, `stop` the method there, or `warn`.
        held_out: share of every task's training examples that no method is trained on and on which `shrink`
            looks for the size of an update; without `shrink` nothing is held out.
    """

    watch: tuple[Any, ...] = ()
    old_tasks: DropLimit = field(default_factory=DropLimit)
    watch_tasks: DropLimit = field(default_factory=DropLimit)
    new_task: GainLimit = field(default_factory=GainLimit)
    confidence: float = 0.95
    on_failure: str = STOP
    held_out: float = 0.1

    def __post_init__(self) -> None:
        watch = tuple(_watch(entry, f"watch[{number}]") for number, entry in enumerate(self.watch))
        object.__setattr__(self, "watch", watch)
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(
                f"confidence must be from 0.5 to below 1 (got {self.confidence})", "leave it out for 0.95"
            )
        if self.on_failure not in ON_FAILURE:
            raise ConfigError(
                f"on_failure must be one of {', '.join(ON_FAILURE)} (got '{self.on_failure}')",
                nearest(self.on_failure, ON_FAILURE),
            )
        if not 0 < self.held_out < 1:
            raise ConfigError(
                f"held_out must be between 0 and 1 (got {self.held_out})", "leave it out for 0.1"
            )
        if self.watch and self.watch_tasks.max_drop is None:
            raise ConfigError(
                "watch names recipes, but watch_tasks sets no limit for them", "set watch_tasks.max_drop"
            )
        if not self.watch and self.watch_tasks.max_drop is not None:
            raise ConfigError(
                "watch_tasks sets a limit, but watch names no recipes",
                "list them under watch, or leave it out",
            )
        if not self.watch and not self.judges_tasks:
            raise ConfigError(
                "old_tasks, new_task and watch set no limit to hold",
                "set old_tasks.max_drop, new_task.min_gain, or watch recipes",
            )

    @property
    def shrinks(self) -> bool:
        """Whether the update of a task that breaks a limit gets smaller."""
        return self.on_failure == SHRINK

    @property
    def judges_tasks(self) -> bool:
        """Whether there are limits for the run's own tasks."""
        return self.old_tasks.max_drop is not None or self.new_task.min_gain is not None


def _watch(entry: Any, where: str) -> WatchConfig:
    if isinstance(entry, WatchConfig):
        return entry
    if isinstance(entry, str):
        return WatchConfig(entry)
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"{where} is {entry!r}, which is no recipe", "name a recipe, or write {task: NAME, examples: N}"
        )
    keys = [each.name for each in fields(WatchConfig)]
    if unknown := [key for key in entry if key not in keys]:
        raise ConfigError(f"{where} has the unknown key '{unknown[0]}'", nearest(str(unknown[0]), keys))
    return build(WatchConfig, entry, where)
