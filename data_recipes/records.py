"""What every reader hands over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets


@dataclass
class Records:
    """What a reader found, in the source's order.

    Attributes:
        ids: one per record, the same wherever the files lie.
        images: a dataset whose column `image` holds bytes or paths, undecoded.
        labels: the source's labels (name or index), None outside classification.
        label_names: names of integer labels, where the source has them.
        questions: one per record, or None.
        answers: the reference answers of each record; empty for classification.
    """

    ids: list[str]
    images: datasets.Dataset
    labels: list[Any]
    label_names: list[str] | None
    questions: list[str | None]
    answers: list[list[str]]


def image_files(paths: list[Path]) -> datasets.Dataset:
    """A dataset of image files that are read when asked for."""
    features = datasets.Features({"image": datasets.Image(decode=False)})
    cells = [{"path": str(p.absolute()), "bytes": None} for p in paths]
    return datasets.Dataset.from_dict({"image": cells}, features=features)
