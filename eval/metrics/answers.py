"""Metrics that compare answers as texts, option letters, numbers, or yes and no."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unicodedata import normalize

from llava_keeplora_eval.answer_forms import (
    find_letter,
    find_number,
    find_yes_no,
    folded,
    is_letter,
    is_number,
    is_yes_no,
    known_form,
    letter_form,
    number_form,
    read_letter,
    read_number,
    read_yes_no,
    words_only,
    yes_no_form,
)
from llava_keeplora_eval.metrics.records import AnswerMetric, Answers, finds_any


def accuracy(text: str, answers: Answers) -> float:
    """Return whether the prediction is one of the accepted texts, letter by letter.

    White space around both and differences of Unicode form don't count; some file systems write a class's
    folder in another form.
    """
    return normalize("NFC", text) in {normalize("NFC", answer.strip()) for answer in answers}


def same_words(text: str, answers: Answers) -> float:
    """Return whether the prediction has an accepted text's words; case, punctuation and underscores aside."""
    return bool(words_only(text)) and words_only(text) in {words_only(answer) for answer in answers}


def exact_match(text: str, answers: Answers) -> float:
    """Return whether the prediction is an accepted text; case, white space and Unicode form aside."""
    return folded(text) in {folded(answer) for answer in answers}


def _matches(
    text: str, answers: Answers, has_form: Callable[[str], bool], read: Callable[[str], Any]
) -> bool:
    """Return whether a text in the requested form has the value of an accepted text, or is such a text."""
    values = {answer.strip().casefold(): read(answer) for answer in answers if read(answer) is not None}
    return text.casefold() in values or (has_form(text) and read(text) in values.values())


def reads_any(find: Callable[[str], Any], read: Callable[[str], Any]) -> Callable[..., float]:
    """Return a lenient rule: the value that `find` finds in the prediction is that of an accepted text.

    Args:
        find: reads a value from a prediction; None if it has none.
        read: reads the value of an accepted text; None if it has none.
    """

    def lenient(text: str, answers: Answers) -> float:
        return find(text) in {read(answer) for answer in answers} - {None} or finds_any(text, answers)

    return lenient


def option_letter(text: str, answers: Answers) -> float:
    """Return whether the prediction is the option's letter and nothing else, in either case.

    An accepted text "(B)" or "B. a dog" means B.
    """
    return _matches(text, answers, is_letter, read_letter)


def numeric(text: str, answers: Answers) -> float:
    """Return whether the prediction is a number in digits with an accepted value: 3, 3.0, but not "three".

    An accepted text may be a number word up to ten, and may end in a period or percent sign: "50%" is 50.
    """
    return _matches(text, answers, is_number, read_number)


def yes_no(text: str, answers: Answers) -> float:
    """Return whether the prediction is the accepted one of yes and no and nothing else, in either case.

    An accepted text "True" or "Yes." means yes, "False" no.
    """
    return _matches(text, answers, is_yes_no, read_yes_no)


_Short = partial(AnswerMetric, kinds=("classification", "vqa"))

METRICS = (
    _Short(
        "accuracy",
        1,
        accuracy,
        "the prediction is one of the accepted texts, letter by letter",
        lenient=same_words,
        complies=known_form,
    ),
    _Short("exact_match", 2, exact_match, "the prediction is one of the accepted texts, case aside"),
    _Short(
        "option_letter",
        2,
        option_letter,
        "the prediction is the option's letter and nothing else",
        lenient=reads_any(find_letter, read_letter),
        complies=letter_form,
    ),
    _Short(
        "numeric",
        2,
        numeric,
        "the prediction is a number of the accepted value and nothing else",
        lenient=reads_any(find_number, read_number),
        complies=number_form,
    ),
    _Short(
        "yes_no",
        2,
        yes_no,
        "the prediction is the accepted one of yes and no and nothing else",
        lenient=reads_any(find_yes_no, read_yes_no),
        complies=yes_no_form,
    ),
)
