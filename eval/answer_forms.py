"""Lenient reading of answers, and checks of their form.

A lenient reader looks for a letter, a number, yes or no, or a phrase anywhere in an answer. Every strict
score comes with a lenient one and the compliance (the share of answers in the requested form), so that a
model that only changed its style ("B." or "The answer is B." for "B") does not count as one that forgot.
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


def words_only(text: str) -> str:
    """Return the words of a text in lower case, without punctuation, underscores and extra white space."""
    return " ".join(re.findall(r"[^\W_]+", normalize("NFC", text.replace("'", "").casefold())))


def folded(text: str) -> str:
    """Return a text in one case and Unicode form (NFC), with single spaces for all white space."""
    return " ".join(normalize("NFC", normalize("NFC", text).casefold()).split())


def _phrase(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in words_only(text).split()]
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
    """Return the exact value of a text for which ``is_number`` holds; commas separate thousands."""
    return Decimal(text.replace(",", ""))


# Readers of accepted texts, in the forms that data sets write them. They return None unless the value is
# certain.


def _compatible(accepted: str) -> str:
    """Return a text in compatibility form (full-width letters become ASCII), stripped of white space."""
    return normalize("NFKC", accepted).strip()


def read_letter(accepted: str) -> str | None:
    """Return the option of "B", "(b)", "B.", "B) a dog" or "(B) a dog"; None for a number or a word."""
    for pattern in _NAMED_LETTER[:2]:
        if match := pattern.fullmatch(_compatible(accepted)):
            return match[1].upper()
    return None


def read_number(accepted: str) -> Decimal | None:
    """Return the value of digits or of a word from zero to ten; a final period or percent sign is ignored."""
    text = re.sub(r"\s*[.%]$", "", _compatible(accepted).replace("\N{MINUS SIGN}", "-")).casefold()
    digits = NUMBERS.get(text, "") if text != "none" else ""
    return to_number(digits or text) if is_number(digits or text) else None


def read_yes_no(accepted: str) -> str | None:
    """Return the yes or no of texts such as "Yes", "no.", "TRUE" or "False"."""
    word = re.sub(r"[.!]$", "", _compatible(accepted)).casefold()
    return {"yes": "yes", "true": "yes", "no": "no", "false": "no"}.get(word)


def find_letter(text: str) -> str | None:
    """Find the option that an answer names, in upper case; None if it names none, or several."""
    for pattern in _NAMED_LETTER:
        if match := pattern.fullmatch(text.strip()):
            return match[1].upper()
    # Single capital letters, except "A" and "I", which are also words.
    letters = set(re.findall(r"\b[B-HJ-Z]\b|(?<=\()[A-Z](?=\))", text))
    return letters.pop() if len(letters) == 1 else None


def find_number(text: str) -> Decimal | None:
    """Find the only number in an answer, in digits or as a word up to ten; None if there isn't just one."""
    numbers = {to_number(digits) for digits in _NUMBER_IN_TEXT.findall(text)}
    numbers |= {Decimal(NUMBERS[word]) for word in words_only(text).split() if word in NUMBERS}
    if is_number(text):  # ".5" has no digit before its point
        numbers = {to_number(text)}
    return numbers.pop() if len(numbers) == 1 else None


def find_yes_no(text: str) -> str | None:
    """Find the yes or no with which an answer begins, or else the only one in it."""
    words = words_only(text).split()
    decisions = {word for word in words if word in ("yes", "no")}
    if words and words[0] in decisions:
        return words[0]
    return decisions.pop() if len(decisions) == 1 else None


_FORMS = ((is_letter, find_letter), (is_number, find_number), (is_yes_no, find_yes_no))


def finds(text: str, accepted: str) -> bool:
    """Return whether a lenient reader finds an accepted answer in a text.

    If the accepted answer is a letter, a number, or yes or no, one is looked for in the text; otherwise the
    answer's words, without case, punctuation and articles.
    """
    accepted = accepted.strip()
    for has_form, find in _FORMS:
        if has_form(accepted):
            return find(text) is not None and find(text) == find(accepted)
    phrase = _phrase(accepted)
    return bool(phrase) and f" {phrase} " in f" {_phrase(text)} "


def is_short(text: str, answers: Sequence[str]) -> bool:
    """Return whether a text is a phrase rather than a sentence: one line, few words, no final mark."""
    limit = max([SHORT, *(len(answer.split()) for answer in answers)])
    ends = re.search(r"[.!?;:](?:\s|$)", text) and not any(text == answer.strip() for answer in answers)
    return "\n" not in text and len(text.split()) <= limit and not ends


# Checks of the requested form. They take a text, its accepted answers, and all accepted answers of the task
# after `words_only`.


def letter_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """Return whether a text is an option letter and nothing else."""
    return is_letter(text)


def number_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """Return whether a text is a number in digits and nothing else."""
    return is_number(text)


def yes_no_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """Return whether a text is yes or no and nothing else."""
    return is_yes_no(text)


def choice_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """Return whether a text is of the accepted answers' form: an option letter, or yes or no."""
    return is_yes_no(text) if any(is_yes_no(answer.strip()) for answer in answers) else is_letter(text)


def short_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """Return whether a text is an option letter where letters are accepted, otherwise whether it is short."""
    if answers and all(is_letter(answer.strip()) for answer in answers):
        return is_letter(text)
    return is_short(text, answers)


def known_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """Return whether a text is an accepted answer of any example; classes without examples don't count."""
    return words_only(text) in known


def box_form(text: str, answers: Sequence[str], known: Collection[str]) -> bool:
    """Return whether a text is four numbers in brackets, separated by commas."""
    return re.fullmatch(r"\[\s*(?:\d*\.?\d+\s*,\s*){3}\d*\.?\d+\s*\]", text) is not None
