"""Sentences on tasks whose update was adopted instead of trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_keeplora.run_folder import CAPACITY, CONSOLIDATED, SCORES, TRAIN, read_record, task_files


def adopted_lines(label: str, folder: Path) -> list[str]:
    """Return a sentence for each adopted task of a method: what the projection took away, and the scores.

    Args:
        label: the method's label, for the sentences.
        folder: the method's folder.
    """
    lines = []
    for path in task_files(folder, TRAIN):
        record = read_record(path).get("adopted")
        if record is not None:
            scores, consolidated = path.with_name(SCORES), path.with_name(CONSOLIDATED)
            protects = consolidated.exists() and CAPACITY in read_record(consolidated)
            found = read_record(scores) if scores.exists() else {}
            lines.append(_line(label, path.parent.name, record, found, protects))
    return lines


def _line(
    label: str, where: str, record: Mapping[str, Any], scores: Mapping[str, Any], protects: bool
) -> str:
    task = where.split("-", 2)[2]
    parts = ", ".join(f"{part} {_percent(share)}" for part, share in record["parts"].items())
    taken = (
        f"the protected subspace takes away {_percent(record['removed'])} of its update's energy ({parts})"
        if record["removed"]
        else "its update is taken over whole"
    )
    kept = (
        "its features are protected from then on"
        if record["protects"] == "features"
        else "without training data, the row directions of its update are protected from then on"
    )
    return (
        f"{label}: {task} was adopted from {record['source']}; {taken}{_scores(task, record, scores)}"
        + f"; {kept}" * protects
    )


def _scores(task: str, record: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """Return a clause with the scores as the update came and as it was taken; empty if both are alike."""
    before = record.get("before", {})
    common = [name for name in before if name in scores]
    if not common:
        return ""
    pairs = []
    if task in common:
        pairs.append((before[task]["score"], scores[task]["score"], "on it"))
    means = [math.fsum(rows[name]["score"] for name in common) / len(common) for rows in (before, scores)]
    pairs.append((*means, "on average over all tasks"))
    return "; " + ", ".join(
        f"{old:.1f} % {what} as it came, {new:.1f} % as it was taken over" for old, new, what in pairs
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
