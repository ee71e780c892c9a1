"""The one base class for errors that a user can repair."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input: one sentence that says what, where and why, and how to cure it.

    Args:
        problem: what is wrong, where, and why (no trailing period).
        cure: the command or edit that repairs it (no trailing period).
    """

    def __init__(self, problem: str, cure: str):
        super().__init__(f"{problem}; {cure}.")
        self.problem, self.cure = problem, cure


class RecipeError(UserError):
    """A recipe, or the data that it names, cannot be used as it is."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt name: ``did you mean 'x'`` or the list of valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(word, valid, n=1)
    return f"did you mean '{close[0]}'" if close else f"valid names are {', '.join(valid)}"
