"""Scoring: from a task and a file of predictions to one number, without a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.metrics import load_metric, metric_record
from llava_keeplora_eval.predictions import first_ids, read_predictions

if TYPE_CHECKING:
    from llava_keeplora_recipes import TaskData


@dataclass(frozen=True)
class Score:
    """The score of one file of predictions, with what is needed to know what it means.

    Args:
        task: the recipe's name.
        version: the recipe's version.
        fingerprint: the fingerprint of the data that was scored.
        split: the split that was scored.
        metric: the metric's name.
        metric_version: the version of the metric's rule.
        score: the score in percent, unrounded.
        n: examples scored; every one of them is in the denominator.
        dropped: unreadable examples that were left out of the data, on the user's word.
        correct: right predictions, for metrics that count them.
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

    def to_dict(self) -> dict:
        """The score as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        counted = f"{self.correct}/{self.n}" if self.correct is not None else f"n={self.n}"
        dropped = f", {self.dropped} dropped" if self.dropped else ""
        return (
            f"{self.task} v{self.version} ({self.split}): {self.metric} v{self.metric_version} "
            f"{self.score:.2f} % ({counted}{dropped})"
        )


def score(data: TaskData, path: str | Path) -> Score:
    """Score a file of predictions against its task; the same inputs always give the same score.

    An empty text is wrong and stays in the denominator.

    Args:
        data: the task and split that was predicted.
        path: the JSONL file of predictions, one line for every id of the data.

    Returns:
        The score, in percent.

    Raises:
        EvalError: no file, no examples, a missing, duplicate or unknown id, predictions for another recipe, version or
            data, or a metric that the package doesn't have.
    """
    path = Path(path)
    record = metric_record(data.recipe.metric)
    if not path.exists():
        raise EvalError(f"there is no predictions file {path}", "run `llava-keeplora-eval predict` first")
    if len(data) == 0:
        raise EvalError(f"{data.recipe.name} ({data.split}) has no examples to score", "check the split and the data")
    texts = read_predictions(path, data)
    missing = [key for key in data.ids if key not in texts]
    if missing:
        raise EvalError(
            f"{path} lacks {first_ids(missing)} of the {len(data)} of {data.recipe.name} ({data.split})",
            "run the same `predict` command again to fill them in",
        )
    result = load_metric(record.name).compute(
        predictions=[texts[key] for key in data.ids], references=_accepted(data)
    )
    return Score(
        task=data.recipe.name,
        version=data.recipe.version,
        fingerprint=data.fingerprint,
        split=data.split,
        metric=record.name,
        metric_version=record.version,
        score=float(result[record.name]) * record.to_percent,
        n=len(data),
        dropped=_count(data.dropped),
        correct=result.get("correct"),
    )


def _accepted(data: TaskData) -> list[list[str]]:
    """The accepted texts of every example, without decoding an image where the label says it all."""
    if data.recipe.kind == "classification":
        return [[data.recipe.classes[label]] for label in data.labels]
    return [list(data[index].answers) for index in range(len(data))]


def _count(dropped) -> int:
    return dropped if isinstance(dropped, int) else len(dropped)
