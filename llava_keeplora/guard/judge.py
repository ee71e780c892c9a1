"""The verdict on one task: each limit is held, broken, or can't be told with as many examples."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from llava_keeplora_eval.paired_bootstrap import Outcome, level_of
from llava_keeplora_eval.paired_scores import flips, paired_change
from llava_keeplora_recipes import TaskData

#: What a limit is of.
OLD, WATCH, NEW = "old task", "watch task", "new task"


#: Largest width and height of an example's picture in the record, in pixels.
PICTURE = 160


@dataclass(frozen=True)
class Limit:
    """A limit on the change of one score, with the answers that it is judged by.

    Args:
        of: `OLD`, `WATCH` or `NEW`.
        data: the examples.
        before, after: id → answer of the model before the task, and after it.
        least: the least accepted change, in points: -2.0 for a drop of at most 2.
        noise: how much the score of one and the same model moved with other batches or another precision, in
            points; None if that was not measured.
    """

    of: str
    data: TaskData
    before: Mapping[str, str]
    after: Mapping[str, str]
    least: float
    noise: float | None = None


def judge(task: str, limits: Sequence[Limit], confidence: float) -> dict[str, Any]:
    """Return the record of a verdict: whether to ship the model, and every limit with its interval.

    A model ships unless a limit is broken. The intervals of all limits together have the confidence.

    Args:
        task: name of what was learned.
        limits: the limits.
        confidence: of all limits together.

    Raises:
        EvalError: an answer is missing, or the change of a score has no interval.
    """
    level = level_of(confidence, len(limits))
    records = [_judged(limit, level) for limit in limits]
    return {
        "task": task,
        "ship": all(record["outcome"] != Outcome.BROKEN for record in records),
        "confidence": confidence,
        "level": level,
        "limits": records,
    }


def _judged(limit: Limit, level: float) -> dict[str, Any]:
    """Return the record of one limit, with examples that flipped if it is broken."""
    change = paired_change(limit.data, limit.before, limit.after, level)
    outcome = change.outcome(limit.least)
    record = {
        "of": limit.of,
        "task": limit.data.recipe.name,
        "outcome": str(outcome),
        "limit": limit.least,
        "change": change.points,
        "low": change.low,
        "high": change.high,
        "before": change.before,
        "after": change.after,
        "n": change.n,
        "better": change.better,
        "worse": change.worse,
        "noise": limit.noise,
        "examples": change.examples(limit.least) if outcome == Outcome.UNDECIDED else None,
        "fingerprint": limit.data.fingerprint,
    }
    if outcome == Outcome.BROKEN:
        rows = {key: row for row, key in enumerate(limit.data.ids)}
        record["flips"] = [
            dataclasses.asdict(flip) | {"picture": _picture(limit.data, rows[flip.id])}
            for flip in flips(limit.data, limit.before, limit.after)
        ]
    return record


def _picture(data: TaskData, row: int) -> str | None:
    """Return a small copy of an example's first image as base64 of a JPEG; None if it has no image."""
    images = data[row].images
    if not images:
        return None
    image, file = images[0].convert("RGB"), BytesIO()
    image.thumbnail((PICTURE, PICTURE))
    image.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()
