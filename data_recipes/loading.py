"""From a recipe to a checked split."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import RecipeError, nearest
from .images import EncodedImages, RenderedImages
from .labels import label_indices, with_classes
from .rendered import label_of
from .rendered_scenes import SCENES, compose
from .sources import read_records
from .task_data import Row, TaskData

if TYPE_CHECKING:
    from .recipe import Recipe

log = logging.getLogger(__name__)
ON_BAD_IMAGE = ("refuse", "drop")


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
    task, stream = recipe.source["task"], recipe.splits[split]
    images = RenderedImages(task, stream)
    if task in SCENES:
        scenes = [compose(task, stream, i) for i in range(len(images.ids))]
        rows = [
            Row(name, _question(recipe, scene.question), scene.answers, None, (i,))
            for i, (name, scene) in enumerate(zip(images.ids, scenes, strict=True))
        ]
    else:
        labels = [label_of(task, i) for i in range(len(images.ids))]
        rows = [
            Row(name, None, (recipe.classes[label],), label, (i,))
            for i, (name, label) in enumerate(zip(images.ids, labels, strict=True))
        ]
    return TaskData(recipe, split, rows, images, dropped=[])


def _load_files(recipe: Recipe, split: str, data_root: str | Path | None, on_bad_image: str) -> TaskData:
    records = read_records(recipe, split, data_root)
    where = f"{recipe.name}/{split}"
    if not records.ids:
        raise RecipeError(f"{where} holds no examples", "add files, or correct 'splits' in the recipe")
    _refuse_duplicates(records.ids, where)
    recipe = with_classes(recipe, records, where)
    labels = label_indices(recipe, records, where)
    rows = [
        Row(
            name,
            _question(recipe, question),
            tuple(answers) if label is None else (recipe.classes[label],),
            label,
            pictures,
        )
        for name, question, answers, label, pictures in zip(
            records.ids, records.questions, records.answers, labels, records.pictures, strict=True
        )
    ]
    if recipe.kind == "classification":
        _refuse_other_than_one(rows, where)
    images = EncodedImages(records.images)
    good, dropped = _sift(rows, images, where, on_bad_image)
    data = TaskData(recipe, split, good, images, dropped)
    _refuse_empty(data, where)
    return data


def _sift(rows: list[Row], images: EncodedImages, where: str, on_bad_image: str) -> tuple[list[Row], list[str]]:
    """The rows whose pictures can all be read, and the ids of the others."""
    bad = images.check(where)
    if not bad:
        return rows, []
    good = [r for r in rows if not any(p in bad for p in r.pictures)]
    dropped = [r.id for r in rows if any(p in bad for p in r.pictures)]
    counted = f"{len(bad)} of {len(images)} images of {where} cannot be read"
    if on_bad_image == "refuse":
        owners = {p: r.id for r in reversed(rows) for p in r.pictures}
        first = ", ".join(f"{owners[p]}: {bad[p]}" for p in sorted(bad)[:3])
        raise RecipeError(
            f"{counted} ({first})", "replace them, or leave them out with on_bad_image: drop"
        )
    log.warning("%s: %d of %d examples are left out", counted, len(dropped), len(rows))
    return good, dropped


def _question(recipe: Recipe, question: str | None) -> str | None:
    """What is asked: the source's question, in the recipe's prompt or for lack of one the prompt itself."""
    if recipe.kind == "captioning":
        return question or recipe.prompt
    if recipe.kind == "vqa" and recipe.prompt is not None:
        return recipe.prompt.replace("{q}", question)
    return question


def _refuse_other_than_one(rows: list[Row], where: str) -> None:
    wrong = [r for r in rows if len(r.pictures) != 1]
    if wrong:
        raise RecipeError(
            f"{len(wrong)} of {len(rows)} records of {where} have no image or several (first: '{wrong[0].id}', "
            f"with {len(wrong[0].pictures)})",
            "give every record one image, or use the kind vqa",
        )


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
