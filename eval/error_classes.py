"""Classes of wrong answers, told apart by rules on words alone.

They are in this order, and an answer is of the first class that it fits, but that another text that is listed
for the example and that the metric doesn't compare is `near`:

- `empty`: nothing but white space.
- `format`: the right answer in another form. The metric's lenient reader finds it (another case, articles, a
  sentence around it, a number word for digits), or its words are part of the answer, unless the answer is
  word for word the accepted answer of another example ("hot dog" for "dog").
- `off by one`: the only number in it differs by one from an accepted whole number.
- `near`: close to an accepted text: singular for plural, the same words in another order, one is the end of
  the other ("dog" for "brown dog"), or a synonym of the list in `synonyms` ("brown sofa" for "brown couch"),
  unless the answer is word for word the accepted answer of another example: a task that asks for both "boat"
  and "ship" tells them apart. Synonyms that the list lacks need a model to be seen and are `other`, and "hot
  dog" for "dog" is `near` where it is the answer of another example.
- `other`: everything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from llava_keeplora_eval.answer_forms import (
    find_number,
    finds,
    is_letter,
    is_number,
    is_yes_no,
    read_number,
    words_only,
)
from llava_keeplora_eval.synonyms import GROUPS
from llava_keeplora_eval.vqa_text import ARTICLES, NUMBERS
from llava_keeplora_recipes.texts import is_blank

ERROR_CLASSES = ("empty", "format", "off by one", "near", "other")
EMPTY, FORMAT, OFF_BY_ONE, NEAR, OTHER = ERROR_CLASSES
#: Most characters of a predicted text in a confusion, and the number of confusions that are listed.
SHOWN, CONFUSIONS = 40, 5


def error_class(
    text: str, answers: Sequence[str], compared: Sequence[str], known: Collection[str], lenient: bool
) -> str:
    """Return the class of a wrong answer; see the module's docstring.

    Args:
        text: the answer.
        answers: all texts that are listed for its example.
        compared: those of them that the metric compares.
        known: the accepted texts of all examples of the task, after `words_only`.
        lenient: whether the metric's lenient reader finds a right answer in it.
    """
    if is_blank(text):
        return EMPTY
    answers = [answer.strip() for answer in answers if not is_blank(answer)]
    listed, accepted = ({words_only(answer) for answer in texts} for texts in (answers, compared))
    if words_only(text) in listed - accepted:
        return NEAR
    whole = words_only(text) in known
    if lenient or (not whole and any(finds(text, answer) for answer in answers)):
        return FORMAT
    if any(_off_by_one(text, answer) for answer in answers):
        return OFF_BY_ONE
    near = any(_near(text, answer) or (not whole and _synonyms(text, answer)) for answer in answers)
    return NEAR if near else OTHER


def _off_by_one(text: str, answer: str) -> bool:
    given, expected = find_number(text), None if answer.endswith("%") else read_number(answer)
    if given is None or expected is None or expected != int(expected):
        return False
    return abs(given - expected) == 1


def _near(text: str, answer: str) -> bool:
    if is_letter(answer) or is_number(answer) or is_yes_no(answer):
        return False
    given, expected = _stems(text), _stems(answer)
    if not given or not expected:
        return False
    ends = given == expected[-len(given) :] or expected == given[-len(expected) :]
    return ends or sorted(given) == sorted(expected)


def _synonyms(text: str, answer: str) -> bool:
    return _one_term_each(_stems(text)) == _one_term_each(_stems(answer)) != []


def _one_term_each(words: Sequence[str]) -> list[str]:
    """Return words with each term of a group of synonyms, longest first, as the group's first term."""
    replaced: list[str] = []
    at = 0
    while at < len(words):
        sizes = range(min(_LONGEST, len(words) - at), 0, -1)
        size = next((n for n in sizes if tuple(words[at : at + n]) in _TERMS), 0)
        replaced += _TERMS[tuple(words[at : at + size])] if size else words[at : at + 1]
        at += size or 1
    return replaced


def _stems(text: str) -> list[str]:
    """Return a text's words in the singular, without articles and with digits for number words."""
    words = [NUMBERS.get(word, word) for word in words_only(text).split()]
    return [_singular(word) for word in words if word not in ARTICLES]


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    plural = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return word[:-1] if plural else word


#: Words of a term → the words of the first term of its group.
_TERMS = {tuple(_stems(term)): _stems(group[0]) for group in GROUPS for term in group}
_LONGEST = max(map(len, _TERMS))


def count_classes(classes: Iterable[str]) -> dict[str, int]:
    """Return class → number of its errors, in the order of `ERROR_CLASSES`, without those that have none."""
    counts = Counter(classes)
    return {name: counts[name] for name in ERROR_CLASSES if counts[name]}


def top_confusions(pairs: Iterable[tuple[str, str]]) -> list[list[str | int]]:
    """Return the most frequent (class, predicted text) of wrong predictions, each with its number.

    Args:
        pairs: of every wrong prediction that is not empty.
    """
    counts = Counter((name, " ".join(text.split())[:SHOWN]) for name, text in pairs)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [[name, text, count] for (name, text), count in ordered[:CONFUSIONS]]
