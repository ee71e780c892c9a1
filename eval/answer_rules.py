"""The rules that score answers, one small function each, and the table that names them.

A rule takes the predicted text (white space around it already gone, never empty), the accepted texts in their order, and by
name what else it needs; it returns the example's score, 0 to 1. A benchmark's rule is its official script's, quirks
included, with two exceptions that hold everywhere: an empty answer is wrong, and so an accepted text that is empty matches
nothing. Where an official file has one answer, the first accepted text is that answer.

Source: eval_*.py of https://github.com/MaolinLuo/KeepLoRA (UCIT, MLLM-DCL, MLLM-ACL, the same in MCITlib and MLLM-CL) and of
https://github.com/zackschen/CoIN.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps

from llava_keeplora_eval.answer_forms import (
    box_form,
    choice_form,
    finds,
    is_letter,
    is_number,
    is_yes_no,
    known_form,
    letter_form,
    number_form,
    plain,
    short_form,
    to_number,
    yes_no_form,
)
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.vqa_text import evalai_normal, one_line, vqa_normal

Answers = Sequence[str]


def contains(text: str, accepted: str) -> bool:
    """Whether an accepted text, not empty, is a part of the text."""
    return bool(accepted) and accepted in text


def first(answers: Answers) -> str:
    """The one answer of an official file; empty, which matches nothing, where there is none."""
    return answers[0] if answers else ""


# Our own


def accuracy(text: str, answers: Answers) -> float:
    """Letter by letter one of the accepted texts, white space around both aside."""
    return text in {answer.strip() for answer in answers}


def exact_match(text: str, answers: Answers) -> float:
    """One of the accepted texts, case and the amount of white space aside."""
    return " ".join(text.casefold().split()) in {" ".join(a.casefold().split()) for a in answers}


def option_letter(text: str, answers: Answers) -> float:
    """The letter of the option and nothing else, in either case."""
    return is_letter(text) and text.upper() in {answer.strip().upper() for answer in answers}


def numeric(text: str, answers: Answers) -> float:
    """A number in digits and nothing else, equal in value to an accepted one: 3, 3.0 and 1,000 are numbers, "three" isn't."""
    accepted = {to_number(a.strip()) for a in answers if is_number(a.strip())}
    return is_number(text) and to_number(text) in accepted


def yes_no(text: str, answers: Answers) -> float:
    """Yes or no and nothing else, in either case."""
    return is_yes_no(text) and text.casefold() in {answer.strip().casefold() for answer in answers}


def _soft(text: str, answers: Answers) -> float:
    """Each person's answer is left out in turn; three of the others make the text right, fewer a part of it.

    With fewer than four answers that could not reach 1, so one of them is enough.
    """
    if len(answers) < 4:
        return text in answers
    others = [answers.count(text) - (own == text) for own in answers]
    return sum(min(1, count / 3) for count in others) / len(answers)


def vqa_accuracy(text: str, answers: Answers) -> float:
    """The official VQA accuracy over the answers of ten people.

    Punctuation, articles, number words and contractions are normalised only where the people disagree: where all ten gave
    the same text, the prediction must be that text to the letter. One accepted answer is nobody's agreement, so there both
    are normalised, and the score is 1 or 0.
    """
    text, answers = one_line(text), [one_line(answer) for answer in answers]
    if len(answers) == 1 or len(set(answers)) > 1:
        text, answers = vqa_normal(text), [vqa_normal(answer) for answer in answers]
    return bool(text) and _soft(text, answers)


# UCIT


def ucit_exact_match(text: str, answers: Answers) -> float:
    """The answer, case aside; a period or an article makes it wrong."""
    return text.upper() == first(answers).upper()


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
    text, gold = text.lower(), first(answers).lower()
    if " " in gold:
        return contains(text, gold)
    gold = gold.replace(".", "")
    if " " in text:
        return bool(gold) and any(piece in text for piece in (" " + gold, gold + " ", gold + ".", gold + ","))
    return contains(text, gold)


@_skips_unanswerable
def dcl_med(text: str, answers: Answers) -> float:
    """The answer is a part of the prediction, case aside, so "no" is found in "unknown"."""
    return contains(text.lower(), first(answers).lower())


@_skips_unanswerable
def dcl_sci(text: str, answers: Answers, *, question: str, image: str) -> float:
    """By the image's file name: AI2D, TQA, VQA and SciVerse ask for the answer itself, case aside. The rest is MapQA: a
    question with "Which states" gets the share of the states that stand between the prediction's commas (a space after a
    comma belongs to the state, further states cost nothing), any other looks for the answer as a part of the prediction."""
    text, gold = text.lower(), first(answers).lower()
    if image.split("/")[-1].split("_")[0] in ("AI2D", "TQA", "VQA", "SciVerse"):
        return text == gold
    if "Which states" in question:
        named = text.split(",")
        return sum(state in named for state in gold.split(",")) / len(gold.split(","))
    return contains(text, gold)


def dcl_sci_lenient(text: str, answers: Answers, *, question: str, image: str) -> float:
    """As ``dcl_sci`` with every state looked for as whole words anywhere in the prediction."""
    if "Which states" in question:
        states = first(answers).split(",")
        return sum(finds(text, state) for state in states) / len(states)
    return finds(text, first(answers))


@_skips_unanswerable
def dcl_fin(text: str, answers: Answers) -> float:
    """The answer, case aside, after spaces and periods are removed from the prediction (not from the answer)."""
    return text.lower().replace(" ", "").replace(".", "") == first(answers).lower()


@_skips_unanswerable
def coin_ocrvqa(text: str, answers: Answers) -> float:
    """The answer, case aside."""
    return text.lower() == first(answers).lower()


# MLLM-ACL


def acl_ocr(text: str, answers: Answers, *, answer_type: str) -> float:
    """OCRBench: any accepted text is a part of the prediction, without line breaks and case; for handwritten formulas without
    spaces and line breaks, and with case. The official sum of hits over 10 is this share in percent of its 1,000 questions."""

    def bare(part: str) -> str:
        if answer_type == "Handwritten Mathematical Expression Recognition":
            return part.strip().replace(" ", "").replace("\n", "")
        return part.lower().strip().replace("\n", "")

    return any(contains(bare(text), bare(answer)) for answer in answers)


def acl_vp(text: str, answers: Answers) -> float:
    """CV-Bench: the answer is a part of the prediction, case, spaces, line breaks and periods aside."""

    def bare(part: str) -> str:
        return re.sub(r"[ \n.]", "", part.lower().strip())

    return contains(bare(text), bare(first(answers)))


# CoIN


def coin_scienceqa(text: str, answers: Answers) -> float:
    """The letter that the prediction is, that it begins with as in "B. a dog", or that its one "The answer is B." names."""
    if text in tuple("ABCDE"):
        named = [text]
    elif re.match(r"[A-E]\. ", text):
        named = [text[0]]
    else:
        named = re.findall(r"The answer is ([A-Z]).", text)
    return named == [first(answers).strip().upper()]


def coin_textvqa(text: str, answers: Answers) -> float:
    """The VQA accuracy over ten answers, both sides always normalised as EvalAI does."""
    text = evalai_normal(text)
    return bool(text) and _soft(text, [evalai_normal(answer) for answer in answers])


def coin_imagenet(text: str, answers: Answers) -> float:
    """The class name is a part of the prediction or the prediction a part of it, with case. Officially an empty prediction
    is right too, and answers are paired with questions by position; here it is wrong, and they are paired by id."""
    return contains(text, first(answers)) or contains(first(answers), text)


def coin_gqa(text: str, answers: Answers) -> float:
    """The answer to the letter, after the prediction lost its last periods and its case, which the answers don't have."""
    return text.rstrip(".").lower() == first(answers)


def _overlap(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); officially in pixels, which changes nothing."""
    width = max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
    height = max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
    union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)) - width * height
    return width * height / union if union > 0 else 0.0


def _four_numbers(text: str) -> list[float] | None:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return numbers if len(numbers) == 4 else None


def _accepted_box(answers: Answers) -> list[float]:
    box = _four_numbers(re.sub(r"[\[\]]", "", first(answers)))
    if box is None:
        raise EvalError(
            f"the accepted answer '{first(answers)}' is no box of four numbers, and this metric compares boxes",
            "check the recipe's answer column, or choose another metric",
        )
    return box


def coin_grounding(text: str, answers: Answers) -> float:
    """The predicted box overlaps the accepted one by more than half (intersection over union). After the brackets the script
    drops a first and a last character more, so that 0.93 is read as 0.9; a prediction that isn't four numbers then is wrong."""
    box = _four_numbers(re.sub(r"[\[\]]", "", text)[1:-1])
    accepted = _accepted_box(answers)
    return box is not None and _overlap(box, accepted) > 0.5


def coin_grounding_lenient(text: str, answers: Answers) -> float:
    """As ``coin_grounding`` with the only four numbers in the text, read to their last digit."""
    box = [float(number) for number in re.findall(r"\d*\.?\d+", text)]
    return len(box) == 4 and _overlap(box, _accepted_box(answers)) > 0.5


# The table


def finds_any(text: str, answers: Answers, **given: str) -> float:
    """An accepted text is found in the prediction, as a lenient reader reads it."""
    return any(finds(text, answer) for answer in answers)


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
    """

    strict: Callable[..., float]
    lenient: Callable[..., float] = finds_any
    complies: Callable[..., bool] = short_form
    soft: bool = False


RULES = {
    "accuracy": AnswerRule(accuracy, same_words, known_form),
    "exact_match": AnswerRule(exact_match),
    "vqa_accuracy": AnswerRule(vqa_accuracy, finds_soft, soft=True),
    "option_letter": AnswerRule(option_letter, complies=letter_form),
    "numeric": AnswerRule(numeric, complies=number_form),
    "yes_no": AnswerRule(yes_no, complies=yes_no_form),
    "ucit_exact_match": AnswerRule(ucit_exact_match),
    "dcl_rs": AnswerRule(dcl_words),
    "dcl_ad": AnswerRule(dcl_words),
    "dcl_med": AnswerRule(dcl_med),
    "dcl_sci": AnswerRule(dcl_sci, dcl_sci_lenient, soft=True),
    "dcl_fin": AnswerRule(dcl_fin, complies=choice_form),
    "acl_ocr": AnswerRule(acl_ocr),
    "acl_vp": AnswerRule(acl_vp),
    "coin_scienceqa": AnswerRule(coin_scienceqa, complies=letter_form),
    "coin_textvqa": AnswerRule(coin_textvqa, finds_soft, soft=True),
    "coin_imagenet": AnswerRule(coin_imagenet),
    "coin_gqa": AnswerRule(coin_gqa),
    "coin_vizwiz": AnswerRule(ucit_exact_match),
    "coin_vqav2": AnswerRule(ucit_exact_match),
    "coin_grounding": AnswerRule(coin_grounding, coin_grounding_lenient, box_form),
    "coin_ocrvqa": AnswerRule(coin_ocrvqa),
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
        strict.append(float(rule.strict(text, answers, **given)) if text else 0.0)
        lenient.append(max(strict[-1], float(rule.lenient(text, answers, **given))) if text else 0.0)
        complying += bool(text) and rule.complies(text, answers, known)
    count = len(predictions)
    result = {name: sum(strict) / count, "lenient": sum(lenient) / count, "compliance": complying / count}
    return result if rule.soft else result | {"correct": int(sum(strict))}
