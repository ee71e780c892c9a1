"""What a lenient reader finds in an answer, and whether the answer has the requested form.

A lenient reader looks for a letter, a number, yes or no, or a phrase.

The lenient score and the compliance stand beside every strict score, so that a model that only changed its
style ("B." or "The answer is B." for "B") is not booked as one that forgot.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from decimal import Decimal
from unicodedata import normalize

from llava_keeplora_eval.vqa_text import ARTICLES, NUMBERS

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_NUMBER_IN_TEXT = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w)")
# The ways in which models name an option: "(B)", "B. a dog", "the answer is B", "option B".
_NAMED_LETTER = (
    re.compile(r"\W*([A-Za-z])\W*"),
    re.compile(r"\(?([A-Za-z])[).:]\s.*", re.DOTALL),
    re.compile(r".*\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*\W?([A-Z])\b.*", re.DOTALL | re.IGNORECASE),
)
SHORT = 5  # words; an answer is short with this many, or with as many as the longest accepted one


def plain(text: str) -> str:
    """Words only: case, punctuation, underscores and white space make no difference."""
    return " ".join(re.findall(r"[^\W_]+", normalize("NFC", text.replace("'", "").casefold())))


def folded(text: str) -> str:
    """A text without differences of case, of the amount of white space and of Unicode form."""
    return " ".join(normalize("NFC", normalize("NFC", text).casefold()).split())


def _phrase(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in plain(text).split()]
    return " ".join([word for word in words if word not in ARTICLES] or words)


def is_letter(text: str) -> bool:
    """Return whether a text is a single letter."""
    return re.fullmatch("[A-Za-z]", text) is not None


def is_number(text: str) -> bool:
    """Return whether a text is a number in digits."""
    return re.fullmatch(_NUMBER, text) is not None and any(c.isdecimal() for c in text)


def is_yes_no(text: str) -> bool:
    """Return whether a text is yes or no, in any case."""
    return text.casefold() in ("yes", "no")


def to_number(text: str) -> Decimal:
    """The value of a text that ``is_number``, to its last digit; commas separate thousands."""
    return Decimal(text.replace(",", ""))


# What an accepted text says beyond doubt, in whatever form data sets write it; None where there is a doubt.


def _compatible(accepted: str) -> str:
    """Full-width letters and digits as the usual ones, without white space around them."""
    return normalize("NFKC", accepted).strip()


def read_letter(accepted: str) -> str | None:
    """The option of "B", "(b)", "B.", "B) a dog" or "(B) a dog"; a number or a word names none."""
    for pattern in _NAMED_LETTER[:2]:
        if match := pattern.fullmatch(_compatible(accepted)):
            return match[1].upper()
    return None


def read_number(accepted: str) -> Decimal | None:
    """The value of digits or of a word from zero to ten, without a last period or percent sign."""
    text = re.sub(r"\s*[.%]$", "", _compatible(accepted).replace("\N{MINUS SIGN}", "-")).casefold()
    digits = NUMBERS.get(text, "") if text != "none" else ""
    return to_number(digits or text) if is_number(digits or text) else None


def read_yes_no(accepted: str) -> str | None:
    """The yes or no of "Yes", "no.", "TRUE" or "False"."""
    word = re.sub(r"[.!]$", "", _compatible(accepted)).casefold()
    return {"yes": "yes", "true": "yes", "no": "no", "false": "no"}.get(word)


def find_letter(text: str) -> str | None:
    """The option that an answer names, in upper case; None where it names none, or none for certain."""
    for pattern in _NAMED_LETTER:
        if match := pattern.fullmatch(text.strip()):
            return match[1].upper()
    # A capital by itself, but "A" and "I" are also words.
    found = set(re.findall(r"\b[B-HJ-Z]\b|(?<=\()[A-Z](?=\))", text))
    return found.pop() if len(found) == 1 else None


def find_number(text: str) -> Decimal | None:
    """The one number in an answer, in digits or as a word up to ten; None where there are none or several."""
    found = {to_number(digits) for digits in _NUMBER_IN_TEXT.findall(text)}
    found |= {Decimal(NUMBERS[word]) for word in plain(text).split() if word in NUMBERS}
    if is_number(text):  # ".5" has no digit before its point
        found = {to_number(text)}
    return found.pop() if len(found) == 1 else None


def find_yes_no(text: str) -> str | None:
    """The yes or no with which an answer begins, or the only one in it."""
    words = plain(text).split()
    found = {word for word in words if word in ("yes", "no")}
    if words and words[0] in found:
        return words[0]
    return found.pop() if len(found) == 1 else None


_FORMS = ((is_letter, find_letter), (is_number, find_number), (is_yes_no, find_yes_no))


def finds(text: str, accepted: str) -> bool:
    """Return whether a lenient reader finds an accepted answer in a text.

    The text is read in the accepted answer's own form, and otherwise as a run of whole words, without case,
    punctuation and articles.
    """
    accepted = accepted.strip()
    for has_form, find in _FORMS:
        if has_form(accepted):
            return find(text) is not None and find(text) == find(accepted)
    wanted = _phrase(accepted)
    return bool(wanted) and f" {wanted} " in f" {_phrase(text)} "


def is_short(text: str, answers: Sequence[str]) -> bool:
    """Whether a text is a phrase without a sentence around it.

    One line, few words, no mark that ends a sentence.
    """
    limit = max([SHORT, *(len(answer.split()) for answer in answers)])
    ends = re.search(r"[.!?;:](?:\s|$)", text) and not any(text == answer.strip() for answer in answers)
    return "\n" not in text and len(text.split()) <= limit and not ends


# Whether a text has the asked form: (text, its accepted answers, all accepted answers of the task, plain) ->
# bool.


def letter_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """An option letter and nothing else."""
    return is_letter(text)


def number_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """A number in digits and nothing else."""
    return is_number(text)


def yes_no_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """Yes or no and nothing else."""
    return is_yes_no(text)


def choice_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """What the accepted answers are: an option letter, or yes or no."""
    return is_yes_no(text) if any(is_yes_no(answer.strip()) for answer in answers) else is_letter(text)


def short_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """An option letter where letters are accepted, otherwise a phrase without a sentence around it."""
    if answers and all(is_letter(answer.strip()) for answer in answers):
        return is_letter(text)
    return is_short(text, answers)


def known_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """One of the texts that is right for some example; a class that no example has is not known here."""
    return plain(text) in known


def box_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """Four numbers in brackets, separated by commas."""
    return re.fullmatch(r"\[\s*(?:\d*\.?\d+\s*,\s*){3}\d*\.?\d+\s*\]", text) is not None
