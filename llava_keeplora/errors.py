"""Errors that a user can correct; the command line prints each as one sentence."""

from __future__ import annotations

from llava_keeplora_recipes.errors import UserError, nearest

__all__ = ["ConfigError", "GuardError", "MethodError", "RunError", "TrainingError", "UserError", "nearest"]


class ConfigError(UserError):
    """Error of a configuration."""


class RunError(UserError):
    """Error of a run folder."""


class GuardError(RunError):
    """Error that stops a program after a training that broke a limit of the guard."""


class MethodError(UserError):
    """Error of a method that cannot be applied to a model with its settings."""


class TrainingError(UserError):
    """Error that stops a training; everything finished before it is kept."""
