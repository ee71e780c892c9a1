"""Conversion of a record's values to text, by one rule for all formats."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from .errors import RecipeError

#: Largest whole number up to which a float is exact; the digits of larger ones would be invented.
EXACT = 2**53
#: Invisible characters: soft hyphens, zero-width spaces and joiners, byte order marks inside a text, marks of
#: direction (Unicode's Default_Ignorable_Code_Point, without variation selectors of emoji).
INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
CURE = "write text, a number, yes or no, or a list of them, or remove the record"


def is_blank(text: str) -> bool:
    """Return whether a text has only white space and invisible characters."""
    return not INVISIBLE.sub("", text).strip()


def as_text(value: Any, what: str, field: str) -> str:
    """Convert a value to text.

    Text stays as it is. A number is written in its shortest form, without a fraction of zero: 3 and 3.0 are
    `3`, 0.50 is `0.5`. A boolean is `yes` or `no`.

    Args:
        value: the value as read from the file.
        what: the record, for errors.
        field: the value's role, for errors.

    Raises:
        RecipeError: it is anything else: null, NaN, infinity, a list, an object, bytes or a date.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        if value == int(value) and abs(value) <= EXACT:
            return str(int(value))
        return str(value) if isinstance(value, float) else f"{value.normalize():f}"
    raise RecipeError(f"{what} has {described(value)} as its {field}", CURE)


def answer_texts(value: Any, what: str) -> list[str]:
    """Return the accepted texts of a record: one value or a list of them; of objects, their `answer`.

    Source of VQAv2's objects: visualqa.org/vqa_v1_download, "Annotation format".

    Args:
        value: the value as read from the file.
        what: the record, for errors.

    Raises:
        RecipeError: there is no answer, or one is no text, number or boolean; see `as_text`.
    """
    if isinstance(value, list):
        values = [_inner(v, what) for v in value]
    else:
        # datasets converts a list of objects to an object of lists.
        inner = _inner(value, what)
        values = inner if isinstance(inner, list) else [inner]
    if not values:
        raise RecipeError(f"{what} has no answer", "complete or remove the record")
    return [as_text(v, what, "answer") for v in values]


def only_answer(answers: list[str], what: str) -> str:
    """Return the only answer of a record, its class.

    Raises:
        RecipeError: it has several answers.
    """
    if len(set(answers)) != 1:
        raise RecipeError(
            f"{what} has {len(answers)} answers, and a record is of one class",
            "keep one of them, or use the kind vqa",
        )
    return answers[0]


def identifier(value: Any, what: str) -> str:
    """Return the id of a record: text, or a number converted by `as_text`.

    Raises:
        RecipeError: it is empty or anything else.
    """
    if value is None or isinstance(value, bool) or (isinstance(value, str) and is_blank(value)):
        raise RecipeError(
            f"{what} has {described(value)} as its id",
            "give every record an id of its own, as text or number",
        )
    return as_text(value, what, "id")


def described(value: Any) -> str:
    """Describe a value in an error: its type in the words of JSON, and its beginning."""
    if value is None:
        return "nothing (null)"
    kinds = {str: "the text", bool: "the boolean", list: "the list", dict: "the object", bytes: "the bytes"}
    number = isinstance(value, int | float | Decimal)
    kind = kinds.get(type(value), "the number" if number else f"the {type(value).__name__}")
    text = repr(value) if not isinstance(value, Decimal) else str(value)
    return f"{kind} {text[:60]}{'...' if len(text) > 60 else ''}"


def _inner(value: Any, what: str) -> Any:
    if not isinstance(value, dict):
        return value
    if "answer" not in value:
        raise RecipeError(f"{what} has {described(value)} as its answer, which has no 'answer' in it", CURE)
    return value["answer"]
