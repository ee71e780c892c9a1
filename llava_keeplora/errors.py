"""Errors that a user can repair; the command line prints each as one sentence."""

from __future__ import annotations

from llava_keeplora_recipes.errors import UserError, nearest

__all__ = ["ConfigError", "MethodError", "RunError", "TrainingError", "UserError", "nearest"]


class ConfigError(UserError):
    """The configuration cannot be used as it is."""


class RunError(UserError):
    """The run folder cannot be used as it is."""


class MethodError(UserError):
    """A method cannot be applied to this model with these settings."""


class TrainingError(UserError):
    """Training stopped; everything finished before it is kept."""
