"""The metric of UCIT's answers; ``captions`` has the one of its captions."""

from __future__ import annotations

from llava_keeplora_eval.metrics.records import AnswerMetric, Answers


def ucit_exact_match(text: str, answers: Answers) -> float:
    """Return whether the prediction is the answer, case aside; a period or an article makes it wrong."""
    return text.upper() == answers[0].upper()


METRICS = (
    AnswerMetric(
        "ucit_exact_match",
        1,
        ucit_exact_match,
        "UCIT: the prediction is the answer, case aside",
        citation="eval_*.py of https://github.com/MaolinLuo/KeepLoRA",
        compares="first",
        kinds=("vqa",),
    ),
)
