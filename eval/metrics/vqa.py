"""VQA accuracy, for which the answers of ten annotators are votes."""

from __future__ import annotations

from collections.abc import Callable

from llava_keeplora_eval.answer_forms import finds
from llava_keeplora_eval.metrics.records import AnswerMetric, Answers
from llava_keeplora_eval.vqa_text import drop_punctuation, evalai_normal, one_line, vqa_normal

#: Fewest answers that are scored by votes; no official script scores fewer so.
VOTES = 4


def _soft(text: str, answers: Answers) -> float:
    """Return the mean over the annotators of min(1, n / 3), for n other annotators who gave this text.

    With fewer than four answers this could not reach 1, so one matching answer is enough.
    """
    if len(answers) < VOTES:
        return text in answers
    others = [answers.count(text) - (answer == text) for answer in answers]
    return sum(min(1, count / 3) for count in others) / len(answers)


def _normalised(text: str, answers: Answers, normal: Callable[[str], str]) -> tuple[str, list[str]]:
    """Normalise a text and its accepted texts.

    Ten answers are normalised as by the official script, which turns both "A" and "the" into nothing. With
    fewer than four answers, for which there is no official script, a text that would become nothing keeps its
    articles, so that the option "A" isn't "the".
    """

    def form(part: str) -> str:
        as_written = (drop_punctuation(part).lower().strip() or part) if len(answers) < VOTES else ""
        return normal(part) or as_written

    return form(text), [form(answer) for answer in answers]


def vqa_accuracy(text: str, answers: Answers) -> float:
    """Return the official VQA accuracy over the answers of ten annotators.

    Punctuation, articles, number words and contractions are normalised only if the annotators disagree: if
    all ten gave the same text, the prediction must be that text to the letter. With one accepted answer, both
    sides are always normalised, and the score is 1 or 0.
    """
    text, answers = one_line(text), [one_line(answer) for answer in answers]
    if len(answers) == 1 or len(set(answers)) > 1:
        text, answers = _normalised(text, answers, vqa_normal)
    return _soft(text, answers)


def finds_soft(text: str, answers: Answers) -> float:
    """Return the best VQA accuracy of the accepted answers that a lenient reader finds in the prediction."""
    normal = [evalai_normal(answer) for answer in answers]
    in_text = {form for answer, form in zip(answers, normal) if form and finds(text, answer)}
    return max((_soft(form, normal) for form in in_text), default=0)


def coin_textvqa(text: str, answers: Answers) -> float:
    """Return the VQA accuracy over ten answers, with both sides always normalised as EvalAI does."""
    return _soft(*_normalised(text, answers, evalai_normal))


METRICS = (
    AnswerMetric(
        "vqa_accuracy",
        2,
        vqa_accuracy,
        "official VQA accuracy over ten answers; one answer: right or wrong",
        citation="Antol et al. 2015, VQA: Visual Question Answering (arXiv:1505.00468); "
        "visualqa.org/evaluation",
        lenient=finds_soft,
        soft=True,
        compares="votes",
        kinds=("vqa",),
    ),
    AnswerMetric(
        "coin_textvqa",
        2,
        coin_textvqa,
        "CoIN TextVQA: VQA accuracy over ten answers, always normalised",
        citation="eval_textvqa.py of https://github.com/zackschen/CoIN",
        lenient=finds_soft,
        soft=True,
        compares="votes",
        kinds=("vqa",),
    ),
)
