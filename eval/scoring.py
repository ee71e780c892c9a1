"""Scoring of a file of predictions, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_keeplora_eval.answer_files import read_answers
from llava_keeplora_eval.error_classes import top_confusions
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.metrics import METRICS, AnswerMetric, MetricRecord, metric_source
from llava_keeplora_eval.references import accepted_texts, check_references, metric_inputs, metric_of
from llava_keeplora_recipes import TaskData
from llava_keeplora_recipes.texts import is_blank


@dataclass(frozen=True)
class Score:
    """The score of one file of predictions, with the data and the metric that it depends on.

    Args:
        task: the recipe's name.
        version: the recipe's version.
        fingerprint: the fingerprint of the data that was scored.
        split: the split that was scored.
        metric: the metric's name; for one from a file, ``module:object``.
        metric_version: the version of the metric's rule.
        score: the score in percent, unrounded.
        n: number of examples scored; every one of them is in the denominator.
        dropped: number of unreadable examples that were left out of the data, as the user allowed.
        correct: number of right predictions, for metrics that count them.
        lenient: the score in percent of a reader who looks for the answer in the text, for metrics of
            answers; its excess over the score was lost to style.
        compliance: the share of answers in the requested form, in percent, for metrics of answers.
        details: further numbers, in percent, and notes, for metrics that have them.
        unmeetable: how many examples get 0 even for their accepted texts.
        metric_source: SHA-256 of the sources of a plug-in metric.
        errors: class → number of predictions without points, for metrics of answers; see ``error_classes``.
        confusions: the most frequent (class, prediction, number) of wrong predictions, for classification.
        units: number of units of which the score is a mean, where these are groups of examples.
    """

    task: str
    version: int | str
    fingerprint: str
    split: str
    metric: str
    metric_version: int
    score: float
    n: int
    dropped: int
    correct: int | None = None
    lenient: float | None = None
    compliance: float | None = None
    details: dict[str, float | str | None] | None = None
    unmeetable: int = 0
    metric_source: str | None = None
    errors: dict[str, int] | None = None
    confusions: list[list[str | int]] | None = None
    units: int | None = None

    def to_dict(self) -> dict:
        """Return the score as plain JSON values; the last four only where there is one."""
        optional = ("metric_source", "errors", "confusions", "units")
        return {key: value for key, value in asdict(self).items() if value is not None or key not in optional}

    @property
    def errors_line(self) -> str:
        """The errors by class, as a line; empty where there are none."""
        listed = ", ".join(f"{count} {name}" for name, count in (self.errors or {}).items())
        return f"errors: {listed}" if listed else ""

    def __str__(self) -> str:
        line = (
            f"{self.task} v{self.version} ({self.split}): {self.metric} v{self.metric_version} "
            f"{self.score:.2f} %"
        )
        for name in ("lenient", "compliance"):
            if (share := getattr(self, name)) is not None:
                line += f", {name} {share:.2f} %"
        notes = [f"{self.correct}/{self.n}" if self.correct is not None else f"n={self.n}"]
        notes += [f"{self.units} units"] * (self.units is not None)
        notes += [f"{name} {_format(value)}" for name, value in (self.details or {}).items()]
        notes += [f"{self.dropped} dropped"] * bool(self.dropped)
        notes += [f"{self.unmeetable} that no answer can meet"] * bool(self.unmeetable)
        return f"{line} ({', '.join(notes)})"


def _format(value: float | str | None) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "n/a" if value is None else value


def score(data: TaskData, path: str | Path, metric: str | None = None, form: str | None = None) -> Score:
    """Score a file of answers; an empty text is wrong and stays in the denominator.

    Args:
        data: the task and split that was predicted.
        path: the file, with an answer for every id of the data, in any form that ``read_answers`` reads.
        metric: another metric than the recipe's.
        form: one of ``answer_files.FORMS``; detected when None.

    Returns:
        The score, in percent.

    Raises:
        EvalError: the file is missing or not valid (see ``read_answers``), the split has no examples, the
            metric is unknown or cannot be computed with these data or on this machine, or no example can get
            points (see ``check_references``).
    """
    path = Path(path)
    name = metric or data.recipe.metric
    record = metric_of(data.recipe, metric)
    if not path.exists():
        raise EvalError(f"there is no predictions file {path}", "run `llava-keeplora-eval predict` first")
    if len(data) == 0:
        raise EvalError(
            f"{data.recipe.name} ({data.split}) has no examples to score", "check the split and the data"
        )
    texts = read_answers(path, data, form)
    record.check_installed()
    references, inputs = accepted_texts(data), metric_inputs(data, record)
    unmet = record.unmeetable(references, **inputs)
    if len(unmet) == len(data):
        check_references(data, name)
    result = record.compute(list(texts.values()), references, **inputs)
    percent = {key: _percent(result.get(key), record) for key in (record.name, "lenient", "compliance")}
    details = result.get("details")
    units = len(record.units(len(data), **inputs))
    return Score(
        task=data.recipe.name,
        version=data.recipe.version,
        fingerprint=data.fingerprint,
        split=data.split,
        metric=METRICS.portable_name(name),
        metric_version=record.version,
        score=percent[record.name],
        n=len(data),
        dropped=_count(data.dropped),
        correct=result.get("correct"),
        lenient=percent["lenient"],
        compliance=percent["compliance"],
        details=details and {key: _percent(value, record) for key, value in details.items()},
        unmeetable=len(unmet),
        metric_source=metric_source(name),
        errors=result.get("errors"),
        confusions=_confusions(data, record, list(texts.values()), references, inputs),
        units=units if units != len(data) else None,
    )


def _confusions(
    data: TaskData,
    record: MetricRecord,
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    inputs: Mapping[str, Sequence[Any]],
) -> list[list[str | int]] | None:
    """Return the most frequent confusions; None for other tasks than classification."""
    if data.recipe.kind != "classification" or not isinstance(record, AnswerMetric):
        return None
    scores = record.example_scores(texts, references, **inputs)
    rows = zip(texts, references, scores, strict=True)
    return top_confusions(
        (accepted[0], text) for text, accepted, got in rows if not got and not is_blank(text)
    )


def _percent(value: Any, record: MetricRecord) -> Any:
    """Return a number on the 0-100 scale; other values are returned as they are."""
    return float(value) * record.to_percent if isinstance(value, int | float) else value


def _count(dropped) -> int:
    return dropped if isinstance(dropped, int) else len(dropped)
