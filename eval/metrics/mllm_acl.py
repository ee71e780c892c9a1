"""Metrics of MLLM-ACL: OCRBench and CV-Bench."""

from __future__ import annotations

import re

from llava_keeplora_eval.metrics.records import AnswerMetric, Answers

SOURCE = "eval_*.py of https://github.com/MaolinLuo/KeepLoRA"


def acl_ocr(text: str, answers: Answers, *, answer_type: str) -> float:
    """Return whether any accepted text is a part of the prediction, case and line breaks aside (OCRBench).

    Handwritten formulas are compared with case, but without spaces and line breaks. The official score, the
    number of hits divided by 10, is this share in percent, as OCRBench has 1,000 questions.
    """

    def normal(part: str) -> str:
        if answer_type == "Handwritten Mathematical Expression Recognition":
            return part.strip().replace(" ", "").replace("\n", "")
        return part.lower().strip().replace("\n", "")

    return any(normal(answer) in normal(text) for answer in answers)


def acl_vp(text: str, answers: Answers) -> float:
    """Return whether the answer is a part of the prediction (CV-Bench).

    Case, spaces, line breaks and periods don't count.
    """

    def normal(part: str) -> str:
        return re.sub(r"[ \n.]", "", part.lower().strip())

    return normal(answers[0]) in normal(text)


METRICS = (
    AnswerMetric(
        "acl_ocr",
        1,
        acl_ocr,
        "MLLM-ACL OCRBench: an answer is a part of the prediction",
        inputs=("answer_type",),
        citation=SOURCE,
        kinds=("vqa",),
    ),
    AnswerMetric(
        "acl_vp",
        2,
        acl_vp,
        "MLLM-ACL CV-Bench: the answer is a part of the prediction, spaces aside",
        citation=SOURCE,
        kinds=("vqa",),
        compares="first",
    ),
)
