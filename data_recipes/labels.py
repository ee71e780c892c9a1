"""Conversion of a source's labels to indices into a recipe's classes."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .errors import RecipeError, nearest
from .placeholders import MARKER, foreign_marker
from .recipe import Recipe
from .records import Records
from .texts import INVISIBLE

log = logging.getLogger(__name__)

#: Function (recipe, split) → the records of the split.
Read = Callable[["Recipe", str], Records]
#: The split whose classes are the task's, where the recipe has it.
TRAIN = "train"


def resolve_classes(recipe: Recipe, split: str, records: Records, read: Read) -> Recipe:
    """Return the recipe with the source's class names if it has `classes: from-source`.

    All splits of a task have the same list of classes, that of its training data (of its first split if the
    recipe has no `train`); otherwise a model would choose among different classes in different splits.

    Args:
        recipe: the recipe as loaded from YAML.
        split: the split that is loaded.
        records: the records of that split.
        read: function that reads another split.

    Raises:
        RecipeError: the source has no class names, another number of them, or two that a model cannot
            distinguish.
    """
    if recipe.classes is not None:
        return recipe
    defining = TRAIN if TRAIN in recipe.splits else next(iter(recipe.splits))
    where = f"{recipe.name}/{defining}"
    names = (records if split == defining else read(recipe, defining)).label_names
    if names is None:
        raise RecipeError(
            f"recipe '{recipe.name}' takes its classes from the source, but the labels of {where} come "
            "without names",
            "list the classes in the recipe, in label order",
        )
    if recipe.num_classes not in (None, len(names)):
        raise RecipeError(
            f"{where} has {len(names)} classes and recipe '{recipe.name}' expects {recipe.num_classes}",
            "use the right dataset, or correct num_classes",
        )
    check_distinct(names, where)
    return replace(recipe, classes=list(names))


def check_distinct(classes: Sequence[str], where: str) -> None:
    """Refuse classes that a model or a metric cannot distinguish: of two with one prompt, one is never right.

    Underscores are spaces in prompts and answers; CLIP's tokenizer and most metrics ignore case and white
    space.

    Args:
        classes: the names.
        where: the file or split, for errors.

    Raises:
        RecipeError: two names differ in these alone, or a name is empty or has an image marker.
    """
    first: dict[str, str] = {}
    for name in classes:
        if not folded(name) or MARKER in name or foreign_marker(name):
            raise RecipeError(f"{where} has the class {name!r}, which is no name", "give it another name")
        other = first.setdefault(folded(name), name)
        if other is not name:
            raise RecipeError(
                f"{where} has the classes {other!r} and {name!r}, "
                "which are one and the same in prompts and answers",
                "join them into one class, or name them apart",
            )


def label_reader(recipe: Recipe, records: Records, where: str) -> Callable[[str, Any], int]:
    """Return a function from a record's id and label to an index into the recipe's classes.

    Labels are matched by name if the source has names. The returned function raises RecipeError, naming the
    record, for a label that is none of the classes.
    """
    classes = recipe.classes or []
    index = {folded(c): i for i, c in enumerate(classes)} | {c: i for i, c in enumerate(classes)}
    index |= {str(label): classes.index(c) for label, c in recipe.class_names.items()}
    if records.label_names is None:
        _warn_of_doubt(recipe, index, records.labels, where)
    return lambda name, raw: _label(recipe, index, raw, records, name, where)


def _warn_of_doubt(recipe: Recipe, index: dict[str, int], labels: Sequence[Any], where: str) -> None:
    """Warn of whole numbers that are read as positions and could be names of other classes."""
    numbers = sorted({label for label in map(as_whole, labels) if _is_whole(label)})
    doubtful = [n for n in numbers if str(n) not in recipe.class_names and index.get(str(n), n) != n]
    if doubtful and 0 <= doubtful[0] < len(recipe.classes):
        log.warning(
            "%s has labels that are numbers, and the classes of recipe '%s' are numbers too: the label %d is "
            "read as the position of the class '%s' (counted from 0), not as the name '%d' (%d such labels); "
            "if names are meant, store them as text, or map them under 'class_names'",
            where,
            recipe.name,
            doubtful[0],
            recipe.classes[doubtful[0]],
            doubtful[0],
            len(doubtful),
        )


def warn_of_names(recipe: Recipe, numbers: set[int], where: str) -> None:
    """Warn of numbers in JSON that are read as names and could be positions of other classes."""
    classes = recipe.classes or []
    doubtful = [
        n for n in sorted(numbers) if str(n) in classes and 0 <= n < len(classes) and classes[n] != str(n)
    ]
    if doubtful:
        log.warning(
            "%s has labels that are numbers, and the classes of recipe '%s' are numbers too: the label %d is "
            "read as the name '%d', not as the position of the class '%s' (counted from 0; %d such labels); "
            "if positions are meant, write the names, or map them under 'class_names'",
            where,
            recipe.name,
            doubtful[0],
            doubtful[0],
            classes[doubtful[0]],
            len(doubtful),
        )


def _label(recipe: Recipe, index: dict[str, int], raw: Any, records: Records, name: str, where: str) -> int:
    raw = as_whole(raw)
    label = raw
    if _is_whole(raw):
        names = records.label_names
        if names is None and str(raw) in recipe.class_names:
            return index[str(raw)]
        if names is None and 0 <= raw < len(recipe.classes):
            return raw
        if names is not None and 0 <= raw < len(names):
            label = names[raw]
    if isinstance(label, str):
        position = index.get(label, index.get(folded(label)))
        if position is not None:
            return position
    raise RecipeError(
        f"'{name}' in {where} has the label {label!r}, which is none of the {len(recipe.classes)} classes of "
        f"recipe '{recipe.name}'",
        "correct the label, add training data of its class, or map it under 'class_names' "
        f"({nearest(str(label), recipe.classes)})",
    )


def as_whole(label: Any) -> Any:
    """Return a number without a fraction as an integer, anything else as it is: tables store 1 as 1.0."""
    if isinstance(label, float | np.floating) and float(label).is_integer():
        return int(label)
    return label


def _is_whole(label: Any) -> bool:
    return isinstance(label, int) and not isinstance(label, bool)


def folded(name: str) -> str:
    """Return a class name without the differences that prompts, tokenizers and metrics ignore."""
    return " ".join(
        unicodedata.normalize("NFC", INVISIBLE.sub("", name).replace("_", " ").casefold()).split()
    )
