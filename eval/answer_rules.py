"""The rules that score answers, one small function each, and the table that names them.

A rule takes the predicted text (white space around it already gone, never empty), the accepted texts that it
compares (at least one of them not empty), and by name what else it needs; it returns the example's score, 0
to 1. A benchmark's rule is its official script's, quirks included, with two exceptions that hold everywhere:
an empty answer is wrong, and an accepted text that is empty matches nothing. Empty is what holds nothing but
white space; a text of which nothing is left once a script has normalised it ("A", "the", ".") is scored as the
script scores it.

Source: eval_*.py of https://github.com/MaolinLuo/KeepLoRA (UCIT, MLLM-DCL, MLLM-ACL, the same in MCITlib and
MLLM-CL) and of https://github.com/zackschen/CoIN; for ScienceQA eval_science_qa.py of
https://github.com/haotian-liu/LLaVA, which KeepLoRA and MCITlib have too (the present one of CoIN takes the
first single letter instead).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal
from unicodedata import normalize

from llava_keeplora_eval.answer_forms import (
    box_form,
    choice_form,
    find_letter,
    find_number,
    find_yes_no,
    finds,
    folded,
    is_letter,
    is_number,
    is_yes_no,
    known_form,
    letter_form,
    number_form,
    plain,
    read_letter,
    read_number,
    read_yes_no,
    short_form,
    yes_no_form,
)
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.vqa_text import drop_punctuation, evalai_normal, one_line, vqa_normal

Answers = Sequence[str]

#: No official script scores fewer accepted texts than this by votes.
VOTES = 4


# Our own


def accuracy(text: str, answers: Answers) -> float:
    """Letter by letter one of the accepted texts, white space around both aside.

    The same letters in another Unicode form, as some file systems write a class's folder, are the same.
    """
    return normalize("NFC", text) in {normalize("NFC", answer.strip()) for answer in answers}


def exact_match(text: str, answers: Answers) -> float:
    """One of the accepted texts, without differences of case, amount of white space or Unicode form."""
    return folded(text) in {folded(answer) for answer in answers}


def _matches(
    text: str, answers: Answers, has_form: Callable[[str], bool], read: Callable[[str], Any]
) -> bool:
    """Return whether a text of the asked form has an accepted text's value, or is one that has a value."""
    values = {answer.strip().casefold(): read(answer) for answer in answers if read(answer) is not None}
    return text.casefold() in values or (has_form(text) and read(text) in values.values())


def option_letter(text: str, answers: Answers) -> float:
    """The letter of the option and nothing else, in either case; an accepted "(B)" or "B. a dog" means B."""
    return _matches(text, answers, is_letter, read_letter)


def numeric(text: str, answers: Answers) -> float:
    """A number in digits and nothing else, equal in value to an accepted one: 3, 3.0, 1,000, but not "three".

    An accepted text may be a number word up to ten, or end in a period or percent sign, which is dropped:
    "50%" is 50.
    """
    return _matches(text, answers, is_number, read_number)


def yes_no(text: str, answers: Answers) -> float:
    """Yes or no and nothing else, in either case; an accepted "True" or "Yes." means yes, "False" no."""
    return _matches(text, answers, is_yes_no, read_yes_no)


def _soft(text: str, answers: Answers) -> float:
    """Each person's answer is left out in turn; three of the others make the text right, fewer a part of it.

    With fewer than four answers that could not reach 1, so one of them is enough.
    """
    if len(answers) < VOTES:
        return text in answers
    others = [answers.count(text) - (own == text) for own in answers]
    return sum(min(1, count / 3) for count in others) / len(answers)


def _normalised(text: str, answers: Answers, normal: Callable[[str], str]) -> tuple[str, list[str]]:
    """Normalise a text and its accepted texts.

    Ten answers are scored as the official script does, to which "A" and "the" are both nothing. Of fewer
    than four, which have no official script, what would be nothing keeps its articles: the option "A" isn't
    "the".
    """

    def form(part: str) -> str:
        as_written = (drop_punctuation(part).lower().strip() or part) if len(answers) < VOTES else ""
        return normal(part) or as_written

    return form(text), [form(answer) for answer in answers]


def vqa_accuracy(text: str, answers: Answers) -> float:
    """The official VQA accuracy over the answers of ten people.

    Punctuation, articles, number words and contractions are normalised only where the people disagree: where all ten gave
    the same text, the prediction must be that text to the letter. One accepted answer is nobody's agreement, so there both
    are normalised, and the score is 1 or 0.
    """
    text, answers = one_line(text), [one_line(answer) for answer in answers]
    if len(answers) == 1 or len(set(answers)) > 1:
        text, answers = _normalised(text, answers, vqa_normal)
    return _soft(text, answers)


# UCIT


def ucit_exact_match(text: str, answers: Answers) -> float:
    """The answer, case aside; a period or an article makes it wrong."""
    return text.upper() == answers[0].upper()


# MLLM-DCL and CoIN's OCR-VQA


def _skips_unanswerable(rule: Callable[..., float]) -> Callable[..., float]:
    """The scripts pass over a prediction with "Unanswerable" in it, spelt so, and keep it in the denominator: it is wrong."""

    @wraps(rule)
    def skipping(text: str, answers: Answers, **given: str) -> float:
        return "Unanswerable" not in text and rule(text, answers, **given)

    return skipping


@_skips_unanswerable
def dcl_words(text: str, answers: Answers) -> float:
    """RS and AD: an answer of several words is a part of the prediction. One of a single word, without its periods, has a
    space before it or a space, period or comma after it, unless the prediction is a single word; then it is a part of it."""
    text, gold = text.lower(), answers[0].lower()
    if " " in gold:
        return gold in text
    gold = gold.replace(".", "")
    if " " in text:
        return any(piece in text for piece in (" " + gold, gold + " ", gold + ".", gold + ","))
    return gold in text


@_skips_unanswerable
def dcl_med(text: str, answers: Answers) -> float:
    """The answer is a part of the prediction, case aside, so "no" is found in "unknown"."""
    return answers[0].lower() in text.lower()


@_skips_unanswerable
def dcl_sci(text: str, answers: Answers, *, question: str, image: str) -> float:
    """By the image's file name: AI2D, TQA, VQA and SciVerse ask for the answer itself, case aside. The rest is MapQA: a
    question with "Which states" gets the share of the states that stand between the prediction's commas (a space after a
    comma belongs to the state, further states cost nothing), any other looks for the answer as a part of the prediction."""
    text, gold = text.lower(), answers[0].lower()
    if image.split("/")[-1].split("_")[0] in ("AI2D", "TQA", "VQA", "SciVerse"):
        return text == gold
    if "Which states" in question:
        named = text.split(",")
        return sum(state in named for state in gold.split(",")) / len(gold.split(","))
    return gold in text


def dcl_sci_lenient(text: str, answers: Answers, *, question: str, image: str) -> float:
    """As ``dcl_sci`` with every state looked for as whole words anywhere in the prediction."""
    if "Which states" in question:
        states = answers[0].split(",")
        return sum(finds(text, state) for state in states) / len(states)
    return finds(text, answers[0])


@_skips_unanswerable
def dcl_fin(text: str, answers: Answers) -> float:
    """The answer, case aside, after spaces and periods are removed from the prediction (not from the answer)."""
    return text.lower().replace(" ", "").replace(".", "") == answers[0].lower()


@_skips_unanswerable
def coin_ocrvqa(text: str, answers: Answers) -> float:
    """The answer, case aside."""
    return text.lower() == answers[0].lower()


# MLLM-ACL


def acl_ocr(text: str, answers: Answers, *, answer_type: str) -> float:
    """OCRBench: any accepted text is a part of the prediction, without line breaks and case; for handwritten formulas without
    spaces and line breaks, and with case. The official sum of hits over 10 is this share in percent of its 1,000 questions."""

    def bare(part: str) -> str:
        if answer_type == "Handwritten Mathematical Expression Recognition":
            return part.strip().replace(" ", "").replace("\n", "")
        return part.lower().strip().replace("\n", "")

    return any(bare(answer) in bare(text) for answer in answers)


def acl_vp(text: str, answers: Answers) -> float:
    """CV-Bench: the answer is a part of the prediction, case, spaces, line breaks and periods aside."""

    def bare(part: str) -> str:
        return re.sub(r"[ \n.]", "", part.lower().strip())

    return bare(answers[0]) in bare(text)


# CoIN


def coin_scienceqa(text: str, answers: Answers) -> float:
    """The letter that the prediction is, that it begins with as in "B. a dog", or that its one "The answer is B." names."""
    if text in tuple("ABCDE"):
        named = [text]
    elif re.match(r"[A-E]\. ", text):
        named = [text[0]]
    else:
        named = re.findall(r"The answer is ([A-Z]).", text)
    return named == [answers[0].strip().upper()]


def coin_textvqa(text: str, answers: Answers) -> float:
    """The VQA accuracy over ten answers, both sides always normalised as EvalAI does."""
    return _soft(*_normalised(text, answers, evalai_normal))


def coin_imagenet(text: str, answers: Answers) -> float:
    """The class name is a part of the prediction or the prediction a part of it, with case. Officially an empty prediction
    is right too, and answers are paired with questions by position; here it is wrong, and they are paired by id."""
    return answers[0] in text or text in answers[0]


def coin_gqa(text: str, answers: Answers) -> float:
    """The answer to the letter, after the prediction lost its last periods and its case, which the answers don't have."""
    return text.rstrip(".").lower() == answers[0]


def _overlaps(box: Sequence[float], other: Sequence[float], size: Any) -> bool:
    """Return whether the intersection over union of two boxes (x1, y1, x2, y2) is above a half.

    It is taken in pixels of the picture's longer side, as in the script, because rounding decides where it
    is a half.

    Raises:
        EvalError: the size isn't a width and a height.
    """
    if not (isinstance(size, list) and [isinstance(side, int | float) for side in size] == [True, True]):
        raise EvalError(
            f"the size {str(size)[:40]!r} is no list of a picture's width and height, which this metric needs",
            "correct 'size' in the data, or choose another metric",
        )
    a, b = ([value * max(size) for value in part] for part in (box, other))
    width, height = max(0, min(a[2], b[2]) - max(a[0], b[0])), max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return union > 0 and width * height / union > 0.5


def _four_numbers(text: str) -> list[float] | None:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return numbers if len(numbers) == 4 else None


def _accepted_box(answers: Answers) -> list[float]:
    box = _four_numbers(re.sub(r"[\[\]]", "", answers[0]))
    if box is None:
        raise EvalError(
            f"the accepted answer '{answers[0]}' is no box of four numbers, and this metric compares boxes",
            "check the recipe's answer column, or choose another metric",
        )
    return box


def coin_grounding(text: str, answers: Answers, *, size: Any) -> float:
    """The predicted box overlaps the accepted one by more than half (intersection over union). After the
    brackets the script drops a first and a last character more, so that 0.93 is read as 0.9; a prediction that
    isn't four numbers then is wrong."""
    box = _four_numbers(re.sub(r"[\[\]]", "", text)[1:-1])
    accepted = _accepted_box(answers)
    return box is not None and _overlaps(box, accepted, size)


def coin_grounding_lenient(text: str, answers: Answers, *, size: Any) -> float:
    """As ``coin_grounding`` with the only four numbers in the text, read to their last digit."""
    box = [float(number) for number in re.findall(r"\d*\.?\d+", text)]
    return len(box) == 4 and _overlaps(box, _accepted_box(answers), size)


# The table


def finds_any(text: str, answers: Answers, **given: str) -> float:
    """An accepted text is found in the prediction, as a lenient reader reads it."""
    return any(finds(text, answer) for answer in answers)


def reads_any(find: Callable[[str], Any], read: Callable[[str], Any]) -> Callable[..., float]:
    """Return the lenient rule for accepted texts that are read: the value found in a text is one of theirs."""

    def lenient(text: str, answers: Answers) -> float:
        return find(text) in {read(answer) for answer in answers} - {None} or finds_any(text, answers)

    return lenient


def finds_soft(text: str, answers: Answers) -> float:
    """The best VQA accuracy of those normalised answers that a lenient reader finds in the prediction."""
    normal = [evalai_normal(answer) for answer in answers]
    found = {form for answer, form in zip(answers, normal) if form and finds(text, answer)}
    return max((_soft(form, normal) for form in found), default=0)


def same_words(text: str, answers: Answers) -> float:
    """An accepted text, without case, punctuation and underscores."""
    return bool(plain(text)) and plain(text) in {plain(answer) for answer in answers}


@dataclass(frozen=True)
class AnswerRule:
    """How one metric scores an answer.

    Args:
        strict: the rule of the headline number.
        lenient: the score of a lenient reader; the higher of both counts, so that lenient is never below strict.
        complies: whether a text has the asked form; see ``answer_forms``.
        soft: whether a score can lie between 0 and 1, so that nothing can be counted as correct.
        compares: which accepted texts are compared: any of them, the first, where an official file has one
            answer, or all of them as votes.
    """

    strict: Callable[..., float]
    lenient: Callable[..., float] = finds_any
    complies: Callable[..., bool] = short_form
    soft: bool = False
    compares: Literal["any", "first", "votes"] = "any"

    def accepted(self, answers: Answers) -> Answers:
        """Return the accepted texts that are compared, none if nothing can match because they are empty."""
        answers = answers[:1] if self.compares == "first" else answers
        written = [answer for answer in answers if answer.strip()]
        return answers if written and self.compares == "votes" else written


RULES = {
    "accuracy": AnswerRule(accuracy, same_words, known_form),
    "exact_match": AnswerRule(exact_match),
    "vqa_accuracy": AnswerRule(vqa_accuracy, finds_soft, soft=True, compares="votes"),
    "option_letter": AnswerRule(option_letter, reads_any(find_letter, read_letter), letter_form),
    "numeric": AnswerRule(numeric, reads_any(find_number, read_number), number_form),
    "yes_no": AnswerRule(yes_no, reads_any(find_yes_no, read_yes_no), yes_no_form),
    "ucit_exact_match": AnswerRule(ucit_exact_match, compares="first"),
    "dcl_rs": AnswerRule(dcl_words, compares="first"),
    "dcl_ad": AnswerRule(dcl_words, compares="first"),
    "dcl_med": AnswerRule(dcl_med, compares="first"),
    "dcl_sci": AnswerRule(dcl_sci, dcl_sci_lenient, soft=True, compares="first"),
    "dcl_fin": AnswerRule(dcl_fin, complies=choice_form, compares="first"),
    "acl_ocr": AnswerRule(acl_ocr),
    "acl_vp": AnswerRule(acl_vp, compares="first"),
    "coin_scienceqa": AnswerRule(coin_scienceqa, complies=letter_form, compares="first"),
    "coin_textvqa": AnswerRule(coin_textvqa, finds_soft, soft=True, compares="votes"),
    "coin_imagenet": AnswerRule(coin_imagenet, compares="first"),
    "coin_gqa": AnswerRule(coin_gqa, compares="first"),
    "coin_vizwiz": AnswerRule(ucit_exact_match, compares="first"),
    "coin_vqav2": AnswerRule(ucit_exact_match, compares="first"),
    "coin_grounding": AnswerRule(coin_grounding, coin_grounding_lenient, box_form, compares="first"),
    "coin_ocrvqa": AnswerRule(coin_ocrvqa, compares="first"),
}


def score_answers(name: str, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[str]) -> dict:
    """Score a task's answers by one rule; an empty answer is wrong by every rule and counts in every share.

    Args:
        name: one of ``RULES``.
        predictions: one text per example.
        references: one list of accepted texts per example.
        inputs: what else the rule takes, one value per example, under the plural of its name (``questions``).

    Returns:
        ``name``, the mean score, and ``lenient`` and ``compliance``, all 0 to 1; ``correct``, how many are right, unless the
        rule is soft.

    Raises:
        EvalError: an accepted text is not what the rule compares.
    """
    rule = RULES[name]
    known = {plain(answer) for answers in references for answer in answers} - {""}
    strict, lenient, complying = [], [], 0
    for i, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
        text, given = prediction.strip(), {key.removesuffix("s"): values[i] for key, values in inputs.items()}
        accepted = rule.accepted(answers)
        can_match = text and accepted
        strict.append(float(rule.strict(text, accepted, **given)) if can_match else 0.0)
        lenient.append(max(strict[-1], float(rule.lenient(text, answers, **given))) if can_match else 0.0)
        complying += bool(text) and rule.complies(text, answers, known)
    count = len(predictions)
    result = {name: sum(strict) / count, "lenient": sum(lenient) / count, "compliance": complying / count}
    return result if rule.soft else result | {"correct": int(sum(strict))}
