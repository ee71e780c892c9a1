"""Multiple-choice questions whose options are in columns of their own."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

from .errors import RecipeError
from .media import is_empty
from .texts import as_text


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty; so is the text "nan", which tables hold that pandas wrote."""
    return is_empty(value) or value == "nan"


def option_set(values: list[Any], what: str) -> dict[str, str]:
    """Return letter → text of the options that a question has, from its cells in the order of A, B, C, ...

    Raises:
        RecipeError: there are fewer than two, or one is no text or number.
    """
    options = {
        letter: as_text(value, what, f"option {letter}")
        for letter, value in zip(ascii_uppercase, values, strict=False)
        if not is_missing(value)
    }
    if len(options) < 2:
        raise RecipeError(
            f"{what} has {len(options)} options, and a choice has at least two",
            "complete the record, or correct 'source.options' in the recipe",
        )
    return options


def ask_choice(question: str, hint: Any, options: dict[str, str]) -> str:
    """Return a question after its hint and before its options, a line each, as LLaVA-1.5 is asked.

    Source: github.com/haotian-liu/LLaVA, llava/eval/model_vqa_mmbench.py.
    """
    before = [] if is_missing(hint) else [str(hint)]
    return "\n".join([*before, question, *(f"{letter}. {text}" for letter, text in options.items())])
