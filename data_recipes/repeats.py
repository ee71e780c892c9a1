"""What a split holds more than once, as sentences.

A picture under two labels, in two splits, the same record twice.

Pictures are the same where their files are, byte for byte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable

from .task_data import TaskData

#: How many are named in a sentence.
NAMED = 3


def repeats(data: TaskData) -> list[str]:
    """What a split says more than once, or in two ways, each kind counted with its first few names."""
    if data.recipe.source["format"] == "rendered":
        return []  # drawn anew for every example, and comparing would draw them all
    pictures = data.picture_digests
    facts = zip(data.histories, data.questions, map(tuple, data.answers), data.labels, pictures, strict=True)
    sentences = []
    if again := _groups(data.ids, facts):
        count = sum(len(names) - 1 for names in again)
        sentences.append(f"{count} examples say what another says, and count twice ({_named(again)})")
    if data.recipe.kind == "classification" and (two := _groups(data.ids, pictures, data.labels)):
        sentences.append(f"{len(two)} pictures are under several labels ({_named(two)})")
    return sentences


def shared_pictures(data: TaskData, other: TaskData) -> str | None:
    """Which pictures of a split are in another one too, counted, with the first few names.

    None if none is.
    """
    if data.recipe.source["format"] == "rendered":
        return None
    here, there = _first(data), _first(other)
    both = [[here[digest], there[digest]] for digest in here if digest in there]
    return f"{len(both)} different images are in '{other.split}' too ({_named(both)})" if both else None


def _first(data: TaskData) -> dict[str, str]:
    """Of each picture's hash, the first example that shows it."""
    found: dict[str, str] = {}
    for name, digests in zip(data.ids, data.picture_digests, strict=True):
        for digest in digests:
            found.setdefault(digest, name)
    return found


def _groups(
    ids: list[str], keys: Iterable[Hashable], values: Iterable[Hashable] | None = None
) -> list[list[str]]:
    """The ids that share a key; with values, one id for each value that a key has, where it has several."""
    found: dict[Hashable, dict[Hashable, str]] = defaultdict(dict)
    for name, key, value in zip(ids, keys, ids if values is None else values):
        found[key].setdefault(value, name)
    return [list(names.values()) for names in found.values() if len(names) > 1]


def _named(groups: list[list[str]]) -> str:
    return ", ".join(" = ".join(names[:NAMED]) for names in groups[:NAMED]) + ", ..." * (len(groups) > NAMED)
