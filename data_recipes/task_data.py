"""One split of a task: sized, indexable, decoded lazily, fingerprinted."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .errors import RecipeError, nearest
from .images import EncodedImages, Images, RenderedImages
from .sources import Records, read_records

if TYPE_CHECKING:
    from .recipe import Recipe

log = logging.getLogger(__name__)
ON_BAD_IMAGE = ("refuse", "drop")


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        id: unique within the split, the same wherever the data lies.
        image: the picture, RGB.
        question: what is asked; None for classification.
        answers: the reference answers; for classification the class name, as in `recipe.classes`.
        label: index into `recipe.classes`; None outside classification.
    """

    id: str
    image: Image.Image
    question: str | None
    answers: list[str]
    label: int | None


@dataclass(frozen=True)
class _Row:
    """An example without its picture, and the picture's row in the store."""

    id: str
    question: str | None
    answers: tuple[str, ...]
    label: int | None
    row: int


class TaskData:
    """One split of a task, or a part of it; made by `Recipe.load`.

    Attributes:
        recipe: the recipe, with its classes read from the source where it leaves them to it.
        split: the split's name.
        ids: the examples' ids, in order.
        labels: the examples' labels, in order; None outside classification.
        dropped: ids of the examples left out because their image cannot be read.
    """

    def __init__(
        self, recipe: Recipe, split: str, rows: list[_Row], images: Images, dropped: list[str]
    ) -> None:
        self.recipe = recipe
        self.split = split
        self.dropped = dropped
        self._rows = rows
        self._images = images

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[operator.index(index)]
        return Example(row.id, self._images.image(row.row), row.question, list(row.answers), row.label)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"TaskData({self.recipe.name}/{self.split}, {len(self)} examples)"

    @property
    def ids(self) -> list[str]:
        return [r.id for r in self._rows]

    @property
    def labels(self) -> list[int | None]:
        return [r.label for r in self._rows]

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each example's encoded image (of its pixels where it is drawn), in order."""
        return [self._images.digest(r.row) for r in self._rows]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the recipe's fingerprint and each example's id, texts, label and image hash.

        The same wherever the data lies and in whatever order; another one as soon as a byte of an
        image changes.
        """
        total = hashlib.sha256(self.recipe.fingerprint.encode())
        for r in sorted(self._rows, key=lambda r: r.id):
            fact = [r.id, r.label, r.question, r.answers, self._images.digest(r.row)]
            total.update(json.dumps(fact, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        return total.hexdigest()

    def take(self, indices: Iterable[int]) -> TaskData:
        """The examples at these positions, in this order; pictures and their hashes are shared.

        Raises:
            IndexError: a position is out of range.
        """
        rows = [self._rows[operator.index(i)] for i in indices]
        return TaskData(self.recipe, self.split, rows, self._images, self.dropped)

    def split_holdout(self, fraction: float, seed: int) -> tuple[TaskData, TaskData]:
        """Cut off a validation part, the same share of every class.

        Which examples it gets follows from a hash of (seed, id), so it depends on neither the order
        nor the number of processes. A class keeps at least one example on the first side.

        Args:
            fraction: share of the second part, between 0 and 1.
            seed: another seed gives another choice.

        Returns:
            The rest and the holdout, both in the order of the data.

        Raises:
            RecipeError: the fraction is not between 0 and 1, or too small for a single example.
        """
        if not 0 < fraction < 1:
            raise RecipeError(
                f"a holdout of {fraction} of {self!r} is impossible", "give a fraction between 0 and 1"
            )
        groups: dict[int | None, list[int]] = defaultdict(list)
        for i, r in enumerate(self._rows):
            groups[r.label].append(i)
        held: set[int] = set()
        for group in groups.values():
            group.sort(key=lambda i: hashlib.sha256(f"{seed}:{self._rows[i].id}".encode()).digest())
            # at least one per class, so that no class goes unvalidated, but never the last one
            count = min(max(1, round(fraction * len(group))), len(group) - 1)
            held.update(group[:count])
        if not held:
            raise RecipeError(
                f"{self!r} has one example per class, so nothing can be held out",
                "use more examples or no holdout",
            )
        everything = range(len(self))
        return self.take(i for i in everything if i not in held), self.take(
            i for i in everything if i in held
        )


def load_task(recipe: Recipe, split: str, data_root: str | Path | None, on_bad_image: str) -> TaskData:
    """Read and check one split; see `Recipe.load`.

    Raises:
        RecipeError: something about the data is not as the recipe says; the sentence names it.
    """
    if on_bad_image not in ON_BAD_IMAGE:
        raise RecipeError(f"on_bad_image is '{on_bad_image}'", nearest(on_bad_image, ON_BAD_IMAGE))
    if split not in recipe.splits:
        raise RecipeError(f"recipe '{recipe.name}' has no split '{split}'", nearest(split, recipe.splits))
    if recipe.source["format"] == "rendered":
        data = _load_rendered(recipe, split)
    else:
        data = _load_files(recipe, split, data_root, on_bad_image)
    expected = recipe.expected_sizes.get(split)
    if expected is not None and expected != len(data):
        log.warning(
            "%s/%s holds %d examples and its recipe expects %d: scores are not comparable with those of others",
            recipe.name,
            split,
            len(data),
            expected,
        )
    return data


def _load_rendered(recipe: Recipe, split: str) -> TaskData:
    images = RenderedImages(recipe.source["task"], recipe.splits[split])
    rows = [
        _Row(name, None, (recipe.classes[label],), label, i)
        for i, (name, label) in enumerate(zip(images.ids, images.labels, strict=True))
    ]
    return TaskData(recipe, split, rows, images, dropped=[])


def _load_files(recipe: Recipe, split: str, data_root: str | Path | None, on_bad_image: str) -> TaskData:
    records = read_records(recipe, split, data_root)
    where = f"{recipe.name}/{split}"
    if not records.ids:
        raise RecipeError(f"{where} holds no examples", "add files, or correct 'splits' in the recipe")
    _refuse_duplicates(records.ids, where)
    recipe = _with_classes(recipe, records, where)
    labels = _labels(recipe, records, where)
    rows = [
        _Row(
            name,
            _question(recipe, question),
            tuple(answers) if label is None else (recipe.classes[label],),
            label,
            i,
        )
        for i, (name, question, answers, label) in enumerate(
            zip(records.ids, records.questions, records.answers, labels, strict=True)
        )
    ]
    images = EncodedImages(records.images)
    bad = images.check(where)
    if bad and on_bad_image == "refuse":
        first = ", ".join(f"{records.ids[r]}: {bad[r]}" for r in sorted(bad)[:3])
        raise RecipeError(
            f"{len(bad)} of {len(rows)} images of {where} cannot be read ({first})",
            "replace them, or leave them out with on_bad_image: drop",
        )
    if bad:
        log.warning("%s: %d of %d images cannot be read and are left out", where, len(bad), len(rows))
    data = TaskData(
        recipe, split, [r for r in rows if r.row not in bad], images, [records.ids[r] for r in sorted(bad)]
    )
    _refuse_empty(data, where)
    return data


def _question(recipe: Recipe, question: str | None) -> str | None:
    """What is asked: the source's question, in the recipe's prompt or for lack of one the prompt itself."""
    if recipe.kind == "captioning":
        return question or recipe.prompt
    if recipe.kind == "vqa" and recipe.prompt is not None:
        return recipe.prompt.replace("{q}", question)
    return question


def _refuse_duplicates(ids: list[str], where: str) -> None:
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise RecipeError(
            f"{where} has {len(twice)} ids more than once ({', '.join(twice[:3])})",
            "give every example its own id",
        )


def _refuse_empty(data: TaskData, where: str) -> None:
    if not len(data):
        raise RecipeError(f"{where} has no readable image left", "replace the images")
    if data.split != "train" or data.recipe.kind != "classification":
        return
    present = set(data.labels)
    empty = [c for i, c in enumerate(data.recipe.classes) if i not in present]
    if empty:
        names = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise RecipeError(
            f"{len(empty)} of {len(data.recipe.classes)} classes have no example in {where} ({names})",
            "add examples, or remove the classes from the recipe",
        )


# ------------------------------------------------------------------------------------- labels


def _with_classes(recipe: Recipe, records: Records, where: str) -> Recipe:
    """The recipe with the source's class names where it says `classes: from-source`."""
    if recipe.classes is not None:
        return recipe
    if records.label_names is None:
        raise RecipeError(
            f"recipe '{recipe.name}' takes its classes from the source, but the labels of {where} come without names",
            "list the classes in the recipe, in label order",
        )
    if recipe.num_classes not in (None, len(records.label_names)):
        raise RecipeError(
            f"{where} has {len(records.label_names)} classes and recipe '{recipe.name}' expects {recipe.num_classes}",
            "use the right dataset, or correct num_classes",
        )
    return replace(recipe, classes=list(records.label_names))


def _labels(recipe: Recipe, records: Records, where: str) -> list[int | None]:
    """The source's labels as indices into the recipe's classes, by name where there are names."""
    if recipe.kind != "classification":
        return [None] * len(records.ids)
    plain = Counter(_plain(c) for c in recipe.classes)
    # a spelling that fits two classes fits neither
    index = {_plain(c): i for i, c in enumerate(recipe.classes) if plain[_plain(c)] == 1}
    index |= {c: i for i, c in enumerate(recipe.classes)}
    index |= {str(label): recipe.classes.index(c) for label, c in recipe.class_names.items()}
    return [
        _label(recipe, index, raw, records, name, where)
        for name, raw in zip(records.ids, records.labels, strict=True)
    ]


def _label(recipe: Recipe, index: dict[str, int], raw: Any, records: Records, name: str, where: str) -> int:
    label = raw
    if isinstance(raw, int) and not isinstance(raw, bool):
        names = records.label_names
        if names is None and str(raw) in recipe.class_names:
            return index[str(raw)]
        if names is None and 0 <= raw < len(recipe.classes):
            return raw
        if names is not None and 0 <= raw < len(names):
            label = names[raw]
    if isinstance(label, str):
        found = index.get(label, index.get(_plain(label)))
        if found is not None:
            return found
    raise RecipeError(
        f"'{name}' in {where} has the label {label!r}, which is none of the {len(recipe.classes)} classes of recipe '{recipe.name}'",
        f"correct the label, or map it under 'class_names' ({nearest(str(label), recipe.classes)})",
    )


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()
