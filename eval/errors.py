"""The error of evaluation that a user can repair."""

from __future__ import annotations

from llava_keeplora_recipes.errors import UserError


class EvalError(UserError):
    """Predictions, a matrix or a metric cannot be used as they are.

    Args:
        problem: what is wrong, where, and why (no trailing period).
        cure: the command or edit that repairs it (no trailing period).
    """
