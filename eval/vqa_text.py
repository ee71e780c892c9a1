"""Normalisation of answers as in the official VQA and TextVQA evaluations.

Source: vqaEvaluation/vqaEval.py of https://github.com/GT-Vision-Lab/VQA, and the EvalAI answer processor that
TextVQA and CoIN use (m4c_evaluator.py of MMF). Both are reproduced with their quirks, because published
numbers depend on them.
"""

from __future__ import annotations

import re
from functools import lru_cache

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# At most this many periods are removed, because the scripts pass the flag re.UNICODE, which is 32, as the
# count.
PERIODS = 32

# Each form is reached from its spellings with one apostrophe missing: "dont", "couldnt've", "couldn'tve".
# "I'm", "I've" and "I'd've" are in the official table too, with a capital that lower-cased text never has.
_FORMS = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "mightn't",
    "mightn't've",
    "might've",
    "mustn't",
    "must've",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "'ow's'at",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'll",
    "y'all'd've",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]
CONTRACTIONS = {
    form[:i] + form[i + 1 :]: form for form in _FORMS for i, letter in enumerate(form) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the official table


def one_line(text: str) -> str:
    """Replace line breaks and tabs by spaces, and strip white space around the text."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def drop_punctuation(text: str) -> str:
    """Remove punctuation marks, or replace them by spaces.

    A mark of `PUNCTUATION` is removed if the text has a space next to one of its kind, or a comma between
    digits; otherwise it becomes a space. A period is removed unless a digit follows it. The hyphen is a mark,
    the apostrophe and the colon are not.
    """
    result = text
    thousands = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        remove = thousands or mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if remove else " ")
    return re.sub(r"\.(?!\d)", "", result, count=PERIODS)


def digits_and_articles(text: str) -> str:
    """Return lower-case text with number words up to ten as digits, without articles, with contractions.

    Contractions that lack their apostrophe ("dont") get it back.
    """
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=2**16)  # annotators' answers repeat
def vqa_normal(text: str) -> str:
    """Normalise a text as the official VQA evaluation does."""
    return digits_and_articles(drop_punctuation(one_line(text)))


def evalai_normal(text: str) -> str:
    """Normalise a text as the TextVQA evaluation does.

    Before VQA's normalisation, commas and question marks are removed, and "'s" becomes a word.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa_normal(text)
