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
        images: a dataset whose column `image` holds bytes or paths, undecoded, one picture per row.
        pictures: the rows in `images` of each record's pictures; none, one or several.
        labels: the source's labels (name or index), None outside classification.
        label_names: names of integer labels, where the source has them.
        questions: one per record, or None.
        answers: the reference answers of each record; empty for classification.
    """

    ids: list[str]
    images: datasets.Dataset
    pictures: list[tuple[int, ...]]
    labels: list[Any]
    label_names: list[str] | None
    questions: list[str | None]
    answers: list[list[str]]


def one_each(count: int) -> list[tuple[int, ...]]:
    """The `pictures` of records that have one picture each, in the same order."""
    return [(i,) for i in range(count)]


def shared_files(paths: list[list[Path]]) -> tuple[datasets.Dataset, list[tuple[int, ...]]]:
    """The `images` and `pictures` of records that name files; a file that several name is one picture."""
    rows: dict[Path, int] = {}
    pictures = [tuple(rows.setdefault(p, len(rows)) for p in own) for own in paths]
    return image_files(list(rows)), pictures


def image_files(paths: list[Path]) -> datasets.Dataset:
    """A dataset of image files that are read when asked for."""
    features = datasets.Features({"image": datasets.Image(decode=False)})
    cells = [{"path": str(p.absolute()), "bytes": None} for p in paths]
    return datasets.Dataset.from_dict({"image": cells}, features=features)
