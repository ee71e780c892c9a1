"""The change of a task's score from one file of answers to another, example by example."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.metrics import MetricRecord
from llava_keeplora_eval.paired_bootstrap import LEAST_RESCORED, Change, mean_change, rescored_change
from llava_keeplora_eval.references import accepted_texts, metric_inputs, metric_of
from llava_keeplora_recipes import TaskData


@dataclass(frozen=True)
class Flip:
    """An example whose answer was better before.

    Args:
        id: the example's.
        question: what was asked; None for a classification.
        expected: its accepted texts.
        before, after: the two answers.
    """

    id: str
    question: str | None
    expected: Sequence[str]
    before: str
    after: str


def check_comparable(data: TaskData) -> None:
    """Check before a long run that the change of a task's score will have an interval.

    Raises:
        EvalError: the split is empty, or its metric starts a program for every scoring, or scores too few
            examples together.
    """
    record, name = metric_of(data.recipe), data.recipe.name
    if not len(data):
        raise EvalError(f"{name} ({data.split}) has no examples to compare", "check the split and the data")
    if _is_mean(record):
        return
    if "java" in record.needs:
        raise EvalError(
            f"the metric '{record.name}' of {name} starts Java for every scoring, and its interval takes "
            "hundreds of them",
            "watch the task with a metric that needs no Java, such as caption_rouge_l",
        )
    if len(data) < LEAST_RESCORED:
        raise EvalError(
            f"the metric '{record.name}' of {name} is no mean over examples and needs at least "
            f"{LEAST_RESCORED} of them for an interval (got {len(data)})",
            "watch more examples, or choose a metric of single answers",
        )


def _is_mean(record: MetricRecord) -> bool:
    return type(record).unit_scores is not MetricRecord.unit_scores


def paired_change(
    data: TaskData, before: Mapping[str, str], after: Mapping[str, str], level: float
) -> Change:
    """Return the change of a task's score from one model's answers to another's.

    Args:
        data: the task and split.
        before, after: id → answer, of every example; those that the metric scores together are drawn
            together, see `MetricRecord.units`.
        level: of each bound of the interval; the resampling's seed is taken from the task's name.

    Raises:
        EvalError: an answer is missing, or see `check_comparable`.
    """
    check_comparable(data)
    record, seed = metric_of(data.recipe), zlib.crc32(data.recipe.name.encode())
    references, inputs = accepted_texts(data), metric_inputs(data, record)
    texts = [_in_order(data, answers) for answers in (before, after)]
    if _is_mean(record):
        units = [record.unit_scores(side, references, **inputs) for side in texts]
        first, second = ([part * record.to_percent for part in side.contributions] for side in units if side)
        span = max(side.span for side in units if side)
        return mean_change(first, second, level, seed, record.to_percent * span)

    def scores(rows: Sequence[int]) -> tuple[float, float]:
        """Return both scores of some examples; the last two rows stand for the added pair of `mean_change`.

        Without them equal answers would have an interval of width 0. Each is an example that was drawn as
        well, with a right answer before and an empty one after, or the reverse.
        """
        at = [row if row < len(data) else rows[place - 1] % len(data) for place, row in enumerate(rows)]
        given = {key: [values[i] for i in at] for key, values in inputs.items()}
        wanted, sides = [references[i] for i in at], [[side[i] for i in at] for side in texts]
        for place, row in enumerate(rows):
            if row >= len(data):
                sides[row - len(data)][place], sides[len(data) - row + 1][place] = wanted[place][0], ""
        first, second = (
            record.compute(side, wanted, **given)[record.name] * record.to_percent for side in sides
        )
        return first, second

    return rescored_change(scores, len(data), level, seed, added=2)


def score_change(data: TaskData, before: Mapping[str, str], after: Mapping[str, str]) -> float:
    """Return the change of a task's score in points alone, which needs no resampling; see `paired_change`.

    Raises:
        EvalError: an answer is missing.
    """
    record = metric_of(data.recipe)
    references, inputs = accepted_texts(data), metric_inputs(data, record)
    first, second = (
        units.mean
        if (units := record.unit_scores(side, references, **inputs))
        else record.compute(side, references, **inputs)[record.name]
        for side in (_in_order(data, answers) for answers in (before, after))
    )
    return second * record.to_percent - first * record.to_percent


def flips(data: TaskData, before: Mapping[str, str], after: Mapping[str, str], most: int = 10) -> list[Flip]:
    """Return examples whose score fell, those that fell most first, then in the order of the data.

    Of a metric that is no mean over examples, these are examples whose answers differ.
    """
    record = metric_of(data.recipe)
    references, inputs = accepted_texts(data), metric_inputs(data, record)
    texts = [_in_order(data, answers) for answers in (before, after)]
    if _is_mean(record):
        first, second = (record.example_scores(side, references, **inputs) or [] for side in texts)
        drops = [a - b for a, b in zip(first, second)]
    else:
        drops = [float(a != b) for a, b in zip(*texts)]
    rows = sorted((i for i, drop in enumerate(drops) if drop > 0), key=lambda i: (-drops[i], i))[:most]
    questions = data.questions
    return [Flip(data.ids[i], questions[i], references[i], texts[0][i], texts[1][i]) for i in rows]


def _in_order(data: TaskData, answers: Mapping[str, str]) -> list[str]:
    missing = [key for key in data.ids if key not in answers]
    if missing:
        raise EvalError(
            f"{len(missing)} of {len(data)} examples of {data.recipe.name} ({data.split}) have no answer "
            f"({missing[0]}, ...)",
            "answer all of them with both models",
        )
    return [answers[key] for key in data.ids]
