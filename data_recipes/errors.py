"""The base class of all errors that a user can repair, and helpers to collect them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

#: Most characters of a problem or a cure.
LONGEST = 2000
#: The address in `<... object at 0x7f...>`, which differs from run to run.
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{6,}(?=>)")

Item = TypeVar("Item")
Result = TypeVar("Result")


class UserError(Exception):
    """A mistake in the input: one sentence that says what, where and why, and how to cure it.

    Args:
        problem: what is wrong, where, and why (no trailing period).
        cure: the command or edit that repairs it (no trailing period).
    """

    def __init__(self, problem: str, cure: str):
        # Names and values are quoted as they are, but the message must stay on one line and have a bounded
        # length.
        sentence = " ".join(f"{_shortened(problem)}; {_shortened(cure)}.".splitlines())
        super().__init__(ADDRESS.sub("", sentence))
        self.problem, self.cure = problem, cure


def _shortened(text: str) -> str:
    """Cut out the middle of a text that is longer than `LONGEST`."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


class RecipeError(UserError):
    """A recipe, or the data that it names, cannot be used as it is."""


class RecipeErrors(RecipeError):
    """Several errors of one source; the message has the first one and the number of the others.

    Args:
        errors: the errors, at least two.
    """

    def __init__(self, errors: list[RecipeError]):
        first, others = errors[0], len(errors) - 1
        super().__init__(
            f"{first.problem} (and {others} more, which `llava-keeplora-eval data check` lists)", first.cure
        )
        self.errors = errors


def collect_errors(
    work: Callable[[Item], Result], items: Iterable[Item], problems: list[RecipeError] | None = None
) -> list[Result]:
    """Apply a function to every item, and report the errors of all items together.

    Args:
        work: the function; it raises RecipeError for an item that cannot be used.
        items: the items.
        problems: list that collects the errors, whose items are left out; they are raised when None.

    Returns:
        the results, in order.

    Raises:
        RecipeError: there are errors, and `problems` is None.
    """
    results, errors = [], []
    for item in items:
        try:
            results.append(work(item))
        except RecipeError as error:
            errors.append(error)
    if errors and problems is None:
        raise errors[0] if len(errors) == 1 else RecipeErrors(errors)
    if errors:
        problems += errors
    return results


def report_error(error: RecipeError, problems: list[RecipeError] | None) -> None:
    """Raise an error, or append it to the list that collects errors; see `collect_errors`."""
    if problems is None:
        raise error
    problems.append(error)


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return a hint for a misspelt name: ``did you mean 'x'`` or the list of valid names."""
    word, valid = str(word), sorted(map(str, valid))  # YAML's keys may be numbers or null.
    close = difflib.get_close_matches(word, valid, n=1)
    if close:
        return f"did you mean '{close[0]}'"
    return f"valid names are {', '.join(valid)}" if valid else "leave it out, as there are none"
