"""What a user can get wrong in a report."""

from __future__ import annotations

from llava_keeplora_recipes.errors import UserError


class ReportError(UserError):
    """A report cannot be made from what was given."""
