"""VQA accuracy: the answers of ten people are votes."""

from __future__ import annotations

from collections.abc import Callable

from llava_keeplora_eval.answer_forms import finds
from llava_keeplora_eval.metrics.records import AnswerMetric, Answers
from llava_keeplora_eval.vqa_text import drop_punctuation, evalai_normal, one_line, vqa_normal

#: No official script scores fewer accepted texts than this by votes.
VOTES = 4


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

    Punctuation, articles, number words and contractions are normalised only where the people disagree: where
    all ten gave the same text, the prediction must be that text to the letter. One accepted answer is
    nobody's agreement, so there both are normalised, and the score is 1 or 0.
    """
    text, answers = one_line(text), [one_line(answer) for answer in answers]
    if len(answers) == 1 or len(set(answers)) > 1:
        text, answers = _normalised(text, answers, vqa_normal)
    return _soft(text, answers)


def finds_soft(text: str, answers: Answers) -> float:
    """The best VQA accuracy of those normalised answers that a lenient reader finds in the prediction."""
    normal = [evalai_normal(answer) for answer in answers]
    found = {form for answer, form in zip(answers, normal) if form and finds(text, answer)}
    return max((_soft(form, normal) for form in found), default=0)


def coin_textvqa(text: str, answers: Answers) -> float:
    """The VQA accuracy over ten answers, both sides always normalised as EvalAI does."""
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
    ),
)
