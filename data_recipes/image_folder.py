"""Folders of images, one per class."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from .errors import RecipeError
from .places import set_folder, split_file
from .records import Records, image_files, one_each

if TYPE_CHECKING:
    from .recipe import Recipe

log = logging.getLogger(__name__)


def read_image_folder(recipe: Recipe, split: str, data_root: str | Path | None) -> Records:
    """`<split folder>/<class>/.../picture`; the class is the folder's name.

    The walk is ours: datasets' own "imagefolder" builder numbers classes alphabetically, drops
    split folders whose names it doesn't know, and passes over other files without a word.

    Raises:
        RecipeError: the folder is missing, or an image lies in no class folder.
    """
    folder = set_folder(recipe, data_root)
    top = split_file(recipe, split, data_root)
    endings = Image.registered_extensions()
    found: dict[str, str] = {}
    others: list[str] = []
    for place, folders, files in os.walk(top, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in files:
            path = Path(place, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() not in endings:
                others.append(path.relative_to(folder).as_posix())
                continue
            parts = path.relative_to(top).parts
            if len(parts) < 2:
                raise RecipeError(
                    f"'{path.relative_to(folder)}' of '{recipe.name}' lies in no class folder",
                    f"move it to {top.name}/<class>/{name}",
                )
            found[path.relative_to(folder).as_posix()] = parts[0]
    if others:
        log.warning(
            "%s/%s: %d files are no images and are left out (%s)",
            recipe.name,
            split,
            len(others),
            ", ".join(sorted(others)[:3]),
        )
    ids = sorted(found)
    return Records(
        ids=ids,
        images=image_files([folder / i for i in ids]),
        pictures=one_each(len(ids)),
        labels=[found[i] for i in ids],
        label_names=None,
        questions=[None] * len(ids),
        answers=[[]] * len(ids),
    )
