"""Metrics of MLLM-DCL: remote sensing, driving, medicine, science and finance; and CoIN's OCR-VQA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps

from llava_keeplora_eval.answer_forms import choice_form, finds
from llava_keeplora_eval.metrics.records import AnswerMetric, Answers


def _skips_unanswerable(rule: Callable[..., float]) -> Callable[..., float]:
    """Make predictions that contain "Unanswerable", in this spelling, wrong.

    The official scripts skip them and keep them in the denominator.
    """

    @wraps(rule)
    def skipping(text: str, answers: Answers, **given: str) -> float:
        return "Unanswerable" not in text and rule(text, answers, **given)

    return skipping


@_skips_unanswerable
def dcl_words(text: str, answers: Answers) -> float:
    """Return whether the answer's words are in the prediction, case aside (RS and AD).

    An answer of several words must be a part of the prediction. An answer of one word, without its periods,
    must have a space before it, or a space, period or comma after it, in a prediction of several words; in a
    prediction of one word it must be a part of it.
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
    """Return whether the answer is a part of the prediction, case aside; so "no" is found in "unknown"."""
    return answers[0].lower() in text.lower()


@_skips_unanswerable
def dcl_sci(text: str, answers: Answers, *, question: str, image: str) -> float:
    """Return the score of a science question; the rule depends on the data set in the image's file name.

    For AI2D, TQA, VQA and SciVerse the prediction must be the answer, case aside. The others are MapQA: a
    question with "Which states" gets the share of the answer's states that are between commas of the
    prediction (a space after a comma belongs to the state; additional states cost nothing); for any other
    question the answer must be a part of the prediction.
    """
    text, gold = text.lower(), answers[0].lower()
    if image.split("/")[-1].split("_")[0] in ("AI2D", "TQA", "VQA", "SciVerse"):
        return text == gold
    if "Which states" in question:
        predicted = text.split(",")
        return sum(state in predicted for state in gold.split(",")) / len(gold.split(","))
    return gold in text


def dcl_sci_lenient(text: str, answers: Answers, *, question: str, image: str) -> float:
    """Return the score of a science question, with states and answers found anywhere in the prediction."""
    if "Which states" in question:
        states = answers[0].split(",")
        return sum(finds(text, state) for state in states) / len(states)
    return finds(text, answers[0])


@_skips_unanswerable
def dcl_fin(text: str, answers: Answers) -> float:
    """Return whether the prediction without spaces and periods is the answer (as it is), case aside."""
    return text.lower().replace(" ", "").replace(".", "") == answers[0].lower()


@_skips_unanswerable
def coin_ocrvqa(text: str, answers: Answers) -> float:
    """Return whether the prediction is the answer, case aside."""
    return text.lower() == answers[0].lower()


_First = partial(
    AnswerMetric,
    compares="first",
    kinds=("vqa",),
    citation="eval_*.py of https://github.com/MaolinLuo/KeepLoRA",
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
