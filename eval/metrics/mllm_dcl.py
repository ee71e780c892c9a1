"""MLLM-DCL: answers of remote sensing, driving, medicine, science and finance.

And CoIN's OCR-VQA, of the same script.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps

from llava_keeplora_eval.answer_forms import choice_form, finds
from llava_keeplora_eval.metrics.records import AnswerMetric, Answers


def _skips_unanswerable(rule: Callable[..., float]) -> Callable[..., float]:
    """The scripts pass over a prediction with "Unanswerable" in it, spelt so, and keep it in the denominator.

    It is wrong.
    """

    @wraps(rule)
    def skipping(text: str, answers: Answers, **given: str) -> float:
        return "Unanswerable" not in text and rule(text, answers, **given)

    return skipping


@_skips_unanswerable
def dcl_words(text: str, answers: Answers) -> float:
    """RS and AD: an answer of several words is a part of the prediction.

    One of a single word, without its periods, has a
    space before it or a space, period or comma after it, unless the prediction is a single word; then it is a
    part of it.
    """
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
    """By the image's file name: AI2D, TQA, VQA and SciVerse ask for the answer itself, case aside.

    The rest is MapQA: a question with "Which states" gets the share of the states that stand between the
    prediction's commas (a space after a comma belongs to the state, further states cost nothing), any other
    looks for the answer as a part of the prediction.
    """
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
    """Compare case aside, after spaces and periods are removed from the prediction (not from the answer)."""
    return text.lower().replace(" ", "").replace(".", "") == answers[0].lower()


@_skips_unanswerable
def coin_ocrvqa(text: str, answers: Answers) -> float:
    """The answer, case aside."""
    return text.lower() == answers[0].lower()


_First = partial(
    AnswerMetric, compares="first", citation="eval_*.py of https://github.com/MaolinLuo/KeepLoRA"
)

METRICS = (
    _First("dcl_rs", 2, dcl_words, "MLLM-DCL remote sensing: the answer's words are in the prediction"),
    _First("dcl_ad", 2, dcl_words, "MLLM-DCL driving: the answer's words are in the prediction"),
    _First("dcl_med", 1, dcl_med, "MLLM-DCL medicine: the answer is a part of the prediction"),
    _First(
        "dcl_sci",
        1,
        dcl_sci,
        "MLLM-DCL science: by data set, equal or a part or a share of states",
        inputs=("question", "image"),
        lenient=dcl_sci_lenient,
        soft=True,
    ),
    _First(
        "dcl_fin",
        1,
        dcl_fin,
        "MLLM-DCL finance: the prediction without spaces and periods is the answer",
        complies=choice_form,
    ),
    _First(
        "coin_ocrvqa",
        1,
        coin_ocrvqa,
        "CoIN OCR-VQA: the prediction is the answer, case aside",
        citation="eval_*.py of https://github.com/zackschen/CoIN",
    ),
)
