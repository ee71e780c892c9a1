"""MLLM-ACL: OCRBench and CV-Bench."""

from __future__ import annotations

import re

from llava_keeplora_eval.metrics.records import AnswerMetric, Answers

SOURCE = "eval_*.py of https://github.com/MaolinLuo/KeepLoRA"


def acl_ocr(text: str, answers: Answers, *, answer_type: str) -> float:
    """OCRBench: any accepted text is a part of the prediction, without line breaks and case.

    Handwritten formulas are compared without spaces and line breaks, and with case. The official sum of hits
    over 10 is this share in percent of its 1,000 questions.
    """

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


METRICS = (
    AnswerMetric(
        "acl_ocr",
        1,
        acl_ocr,
        "MLLM-ACL OCRBench: an answer is a part of the prediction",
        inputs=("answer_type",),
        citation=SOURCE,
    ),
    AnswerMetric(
        "acl_vp",
        2,
        acl_vp,
        "MLLM-ACL CV-Bench: the answer is a part of the prediction, spaces aside",
        citation=SOURCE,
        compares="first",
    ),
)
