"""Errors that a user can correct; the command line prints each as one sentence."""

from __future__ import annotations

from typing import Any

from llava_keeplora_recipes.errors import UserError, nearest

__all__ = [
    "ConfigError",
    "GuardError",
    "IdleOptionError",
    "MethodError",
    "RunError",
    "TrainingError",
    "UserError",
    "nearest",
]


class ConfigError(UserError):
    """Error of a configuration."""


class RunError(UserError):
    """Error of a run folder."""


class GuardError(RunError):
    """Error that stops a program after a training that broke a limit of the guard."""


class MethodError(UserError):
    """Error of a method that cannot be applied to a model with its settings."""


class IdleOptionError(MethodError):
    """Error of an option that is set, and has no effect with the others.

    Args:
        option: its name.
        default: its default.
        when: with what it has an effect, with what was given.
        cure: what to do instead of removing it.
    """

    def __init__(self, option: str, default: Any, when: str, cure: str):
        super().__init__(f"{option} has an effect only {when}", f"remove it, or {cure}")
        self.option, self.default = option, default


class TrainingError(UserError):
    """Error that stops a training; everything finished before it is kept."""
