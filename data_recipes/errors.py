"""The one base class for errors that a user can repair."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

#: Characters of a problem or a cure.
LONGEST = 2000
#: Of `<... object at 0x7f...>`, which says nothing and differs from run to run.
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
        # Names and values are quoted as they are; a line break in one of them must not make it two lines, nor
        # its length a page.
        sentence = " ".join(f"{_shortened(problem)}; {_shortened(cure)}.".splitlines())
        super().__init__(ADDRESS.sub("", sentence))
        self.problem, self.cure = problem, cure


def _shortened(text: str) -> str:
    """Text without its middle where it is longer than `LONGEST`."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


class RecipeError(UserError):
    """A recipe, or the data that it names, cannot be used as it is."""


class RecipeErrors(RecipeError):
    """Several mistakes of one source: the sentence tells the first one and counts the others.

    Args:
        errors: the mistakes, at least two.
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
    """What `work` makes of every item; those that it refuses are named together, not only the first.

    Args:
        work: raises RecipeError for an item that cannot be used.
        items: what to work on.
        problems: collects the refusals, and the refused items are left out; None raises instead.

    Raises:
        RecipeError: there are refusals, and nobody collects them.
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
    """Raise an error, or leave it to a caller who collects them; see `collect_errors`."""
    if problems is None:
        raise error
    problems.append(error)


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt name: ``did you mean 'x'`` or the list of valid names."""
    word, valid = str(word), sorted(map(str, valid))  # YAML's keys may be numbers, or nothing.
    close = difflib.get_close_matches(word, valid, n=1)
    return f"did you mean '{close[0]}'" if close else f"valid names are {', '.join(valid)}"
