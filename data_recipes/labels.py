"""From the labels of a source to indices into a recipe's classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .errors import RecipeError, nearest
from .records import Records

if TYPE_CHECKING:
    from .recipe import Recipe


def with_classes(recipe: Recipe, records: Records, where: str) -> Recipe:
    """The recipe with the source's class names where it says `classes: from-source`.

    Raises:
        RecipeError: the source has no class names, or another number of them.
    """
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


def label_reader(recipe: Recipe, records: Records, where: str) -> Callable[[str, Any], int]:
    """From a record's id and the source's label to an index into the recipe's classes, by name where there are names.

    The returned function raises RecipeError for a label that is none of the classes; it names the record.
    """
    classes = recipe.classes or []
    plain = Counter(_plain(c) for c in classes)
    # a spelling that fits two classes fits neither
    index = {_plain(c): i for i, c in enumerate(classes) if plain[_plain(c)] == 1}
    index |= {c: i for i, c in enumerate(classes)}
    index |= {str(label): classes.index(c) for label, c in recipe.class_names.items()}
    return lambda name, raw: _label(recipe, index, raw, records, name, where)


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
