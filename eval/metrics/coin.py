"""Metrics of CoIN: ScienceQA, ImageNet, GQA, VizWiz, VQAv2 and grounding.

CoIN's TextVQA is in ``vqa``, its OCR-VQA in ``mllm_dcl``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from llava_keeplora_eval.answer_forms import box_form, letter_form
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.metrics.records import AnswerMetric, Answers
from llava_keeplora_eval.metrics.ucit import ucit_exact_match


def coin_scienceqa(text: str, answers: Answers) -> float:
    """Return whether the prediction names the accepted letter.

    It may be the letter, begin with it as in ``B. A dog``, or have exactly one ``The answer is B.``
    """
    if text in tuple("ABCDE"):
        letters = [text]
    elif re.match(r"[A-E]\. ", text):
        letters = [text[0]]
    else:
        letters = re.findall(r"The answer is ([A-Z]).", text)
    return letters == [answers[0].strip().upper()]


def coin_imagenet(text: str, answers: Answers) -> float:
    """Return whether the class name is a part of the prediction or vice versa, with case.

    In the official script an empty prediction is right as well, and answers are paired with questions by
    position; here it is wrong, and they are paired by id.
    """
    return answers[0] in text or text in answers[0]


def coin_gqa(text: str, answers: Answers) -> float:
    """Return whether the prediction, in lower case and without final periods, is the answer."""
    return text.rstrip(".").lower() == answers[0]


def _overlaps(box: Sequence[float], other: Sequence[float], size: Any) -> bool:
    """Return whether the intersection over union of two boxes (x1, y1, x2, y2) is above a half.

    Coordinates are scaled to pixels of the image's longer side, as in the script, because rounding decides
    where the ratio is exactly a half.

    Raises:
        EvalError: the size isn't a width and a height.
    """
    if not (isinstance(size, list) and [isinstance(side, int | float) for side in size] == [True, True]):
        raise EvalError(
            f"the size {str(size)[:40]!r} is no list of an image's width and height, which this metric needs",
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
    """Return whether the predicted box overlaps the accepted one by more than half (intersection over union).

    After the brackets the script drops one more character at both ends, so that a final 0.93 is read as 0.9;
    a prediction that isn't four numbers then is wrong.
    """
    box = _four_numbers(re.sub(r"[\[\]]", "", text)[1:-1])
    accepted = _accepted_box(answers)
    return box is not None and _overlaps(box, accepted, size)


def coin_grounding_lenient(text: str, answers: Answers, *, size: Any) -> float:
    """Apply ``coin_grounding`` to the only four numbers in the text, read to their last digit."""
    box = [float(number) for number in re.findall(r"\d*\.?\d+", text)]
    return len(box) == 4 and _overlaps(box, _accepted_box(answers), size)


_First = partial(
    AnswerMetric, compares="first", kinds=("vqa",), citation="eval_*.py of https://github.com/zackschen/CoIN"
)

METRICS = (
    # LLaVA's script, which KeepLoRA and MCITlib use as well; CoIN's present script takes the first single
    # letter.
    _First(
        "coin_scienceqa",
        1,
        coin_scienceqa,
        "CoIN ScienceQA: the letter that the prediction is, begins with or names",
        citation="eval_science_qa.py of https://github.com/haotian-liu/LLaVA",
        complies=letter_form,
    ),
    _First(
        "coin_imagenet",
        1,
        coin_imagenet,
        "CoIN ImageNet: one of prediction and class name is a part of the other",
    ),
    _First(
        "coin_gqa", 1, coin_gqa, "CoIN GQA: the prediction in lower case without last periods is the answer"
    ),
    _First("coin_vizwiz", 1, ucit_exact_match, "CoIN VizWiz: the prediction is the one answer, case aside"),
    _First("coin_vqav2", 1, ucit_exact_match, "CoIN VQAv2: the prediction is the one answer, case aside"),
    _First(
        "coin_grounding",
        2,
        coin_grounding,
        "CoIN Grounding: the boxes overlap by more than half",
        inputs=("size",),
        lenient=coin_grounding_lenient,
        complies=box_form,
    ),
)
