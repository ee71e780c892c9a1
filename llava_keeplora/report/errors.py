"""The error of a report that cannot be made."""

from __future__ import annotations

from llava_keeplora_recipes.errors import UserError


class ReportError(UserError):
    """A report cannot be made from what was given."""
