"""The one rule by which a value of a record becomes text."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from .errors import RecipeError

#: Whole numbers above it are not told apart by a float, so that its digits would be invented.
EXACT = 2**53
#: Characters without a width or a look of their own: soft hyphens, zero-width spaces and joiners, byte order
#: marks inside of a text, marks of direction (Unicode's Default_Ignorable_Code_Point, without those that
#: choose an emoji's look).
INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
CURE = "write text, a number, yes or no, or a list of them, or remove the record"


def is_blank(text: str) -> bool:
    """Whether a text holds nothing but white space and characters that nobody sees."""
    return not INVISIBLE.sub("", text).strip()


def as_text(value: Any, what: str, field: str) -> str:
    """The text that a value stands for.

    Text stays as it is. A number is written in its shortest form, without a fraction that is zero: 3 and 3.0
    are `3`, 0.50 is `0.5`. A boolean is `yes` or `no`.

    Args:
        value: as the file's reader gives it.
        what: the record, for the error's sentence.
        field: what the value is there, for the error's sentence.

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
    """The accepted texts of a record: one value, or a list of them; objects are read by `answer`.

    Source of VQAv2's objects: visualqa.org/vqa_v1_download, "Annotation format".

    Args:
        value: as the file's reader gives it.
        what: the record, for the error's sentence.

    Raises:
        RecipeError: there is no answer, or one is no text, number or boolean; see `as_text`.
    """
    if isinstance(value, list):
        values = [_inner(v, what) for v in value]
    else:
        # datasets makes an object of lists of a list of objects
        inner = _inner(value, what)
        values = inner if isinstance(inner, list) else [inner]
    if not values:
        raise RecipeError(f"{what} has no answer", "complete or remove the record")
    return [as_text(v, what, "answer") for v in values]


def only_answer(answers: list[str], what: str) -> str:
    """The class of a record.

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
    """The id of a record: text, or a number in the form of `as_text`.

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
    """A value in a sentence: its kind in the words of JSON, and the beginning of what it is."""
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
