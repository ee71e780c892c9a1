"""Loading and inspection of a recipe's splits."""

from __future__ import annotations

import logging
from pathlib import Path

from .errors import RecipeError, nearest
from .images import RenderedImages
from .prompts import format_question
from .recipe import Recipe
from .rendered import label_of
from .rendered_scenes import SCENES, compose
from .task_data import Row, TaskData

log = logging.getLogger(__name__)
ON_BAD_IMAGE = ("refuse", "drop")


def load_split(
    recipe: Recipe, split: str, data_root: str | Path | None = None, on_bad_image: str = "refuse"
) -> TaskData:
    """Load one split; every record is checked, and every image decoded once.

    Args:
        recipe: the task.
        split: one of its `splits`, for example `train`.
        data_root: the folder to which the source's `path` is relative; not needed for rendered tasks.
        on_bad_image: `refuse`, or `drop` to leave unreadable images out and list them in `TaskData.dropped`.

    Raises:
        RecipeError: the data differ from the recipe's description; the message says where.
    """
    if on_bad_image not in ON_BAD_IMAGE:
        raise RecipeError(f"on_bad_image is '{on_bad_image}'", nearest(on_bad_image, ON_BAD_IMAGE))
    _refuse_split(recipe, split)
    if recipe.source["format"] == "rendered":
        data = _load_rendered(recipe, split)
    else:
        # It imports datasets, which takes over a second, and which rendered tasks don't need.
        from .file_loading import load_files

        data = load_files(recipe, split, data_root, on_bad_image)
    for note in filter(None, (data.left_out_note, data.marker_note)):
        log.warning("%s/%s: %s", recipe.name, split, note)
    expected = recipe.expected_sizes.get(split)
    if expected is not None and expected != len(data):
        log.warning(
            "%s/%s holds %d examples and its recipe expects %d: scores are not comparable with those of "
            "others",
            recipe.name,
            split,
            len(data),
            expected,
        )
    return data


def inspect_split(
    recipe: Recipe, split: str, data_root: str | Path | None = None
) -> tuple[TaskData | None, list[RecipeError]]:
    """Load one split as `load_split` does, and collect all errors.

    Args:
        recipe, split, data_root: see `load_split`.

    Returns:
        the examples that can be used (None if nothing can be read), and all errors.
    """
    problems: list[RecipeError] = []
    try:
        _refuse_split(recipe, split)
        if recipe.source["format"] == "rendered":
            return _load_rendered(recipe, split), []
        from .file_loading import load_files  # see load_split

        return load_files(recipe, split, data_root, "drop", problems), problems
    except RecipeError as error:
        return None, [*problems, error]


def _refuse_split(recipe: Recipe, split: str) -> None:
    if split not in recipe.splits:
        raise RecipeError(f"recipe '{recipe.name}' has no split '{split}'", nearest(split, recipe.splits))


def _load_rendered(recipe: Recipe, split: str) -> TaskData:
    task, stream = recipe.source["task"], recipe.splits[split]
    images = RenderedImages(task, stream)
    if task in SCENES:
        scenes = [compose(task, stream, i) for i in range(len(images.ids))]
        rows = [
            Row(
                name,
                format_question(recipe, split, scene.question, scene.answers, 1, name),
                scene.answers,
                None,
                (i,),
            )
            for i, (name, scene) in enumerate(zip(images.ids, scenes, strict=True))
        ]
    else:
        labels = [label_of(task, i) for i in range(len(images.ids))]
        rows = [
            Row(name, None, (recipe.classes[label],), label, (i,))
            for i, (name, label) in enumerate(zip(images.ids, labels, strict=True))
        ]
    return TaskData(recipe, split, rows, images, dropped=[])
