"""Warnings of repeated data: the same record twice, an image under two labels, or in two splits.

Two images are the same if their files are, byte for byte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable

from .task_data import TaskData

#: How many examples are named in a sentence.
NAMED = 3


def repeats(data: TaskData) -> list[str]:
    """Return a sentence for each kind of repetition in a split, with its number and its first few names."""
    if data.recipe.source["format"] == "rendered":
        return []  # comparing would draw all images
    images = data.image_digests
    facts = zip(data.histories, data.questions, map(tuple, data.answers), data.labels, images, strict=True)
    sentences = []
    if again := _groups(data.ids, facts):
        count = sum(len(names) - 1 for names in again)
        sentences.append(f"{count} examples say what another says, and count twice ({_named(again)})")
    if data.recipe.kind == "classification" and (two := _groups(data.ids, images, data.labels)):
        sentences.append(f"{len(two)} images are under several labels ({_named(two)})")
    return sentences


def shared_images(data: TaskData, other: TaskData) -> str | None:
    """Return a sentence on the images of a split that are also in another one; None if there are none."""
    if data.recipe.source["format"] == "rendered":
        return None
    here, there = _first(data), _first(other)
    both = [[here[digest], there[digest]] for digest in here if digest in there]
    return f"{len(both)} different images are in '{other.split}' too ({_named(both)})" if both else None


def _first(data: TaskData) -> dict[str, str]:
    """Return each image's hash → the first example that has it."""
    first: dict[str, str] = {}
    for name, digests in zip(data.ids, data.image_digests, strict=True):
        for digest in digests:
            first.setdefault(digest, name)
    return first


def _groups(
    ids: list[str], keys: Iterable[Hashable], values: Iterable[Hashable] | None = None
) -> list[list[str]]:
    """Return groups of ids that share a key; with values, one id for each value of a key that has several."""
    groups: dict[Hashable, dict[Hashable, str]] = defaultdict(dict)
    for name, key, value in zip(ids, keys, ids if values is None else values):
        groups[key].setdefault(value, name)
    return [list(names.values()) for names in groups.values() if len(names) > 1]


def _named(groups: list[list[str]]) -> str:
    return ", ".join(" = ".join(names[:NAMED]) for names in groups[:NAMED]) + ", ..." * (len(groups) > NAMED)
