"""Folders of images, one per class."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from .errors import RecipeError, sift
from .places import data_root_of, set_folder, split_file, within
from .records import Records, classified, picture_files

if TYPE_CHECKING:
    from .recipe import Recipe

log = logging.getLogger(__name__)


def read_image_folder(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """`<split folder>/<class>/.../picture`; the class is the folder's name.

    The walk is ours: datasets' own "imagefolder" builder numbers classes alphabetically, drops
    split folders whose names it doesn't know, and passes over other files without a word.

    Raises:
        RecipeError: the folder is missing, or an image lies in no class folder.
    """
    folder = set_folder(recipe, data_root)
    top, root = split_file(recipe, split, data_root), data_root_of(recipe, data_root)
    paths = files_under(top)
    endings = Image.registered_extensions()
    others = [p.relative_to(folder).as_posix() for p in paths if p.suffix.lower() not in endings]

    def labelled(path: Path) -> tuple[str, str]:
        within(path, f"the {split} split of '{recipe.name}'", root)
        parts = path.relative_to(top).parts
        if len(parts) < 2:
            raise RecipeError(
                f"'{path.relative_to(folder)}' of '{recipe.name}' lies in no class folder",
                f"move it to {top.name}/<class>/{path.name}",
            )
        return path.relative_to(folder).as_posix(), parts[0]

    found = dict(sift(labelled, [p for p in paths if p.suffix.lower() in endings], problems))
    if others:
        log.warning(
            "%s/%s: %d files are no images and are left out (%s)",
            recipe.name,
            split,
            len(others),
            ", ".join(sorted(others)[:3]),
        )
    ids = sorted(found)
    # A recipe that reads its classes from here has them in the order of their names.
    names = sorted(set(found.values())) if recipe.classes is None else None
    return classified(ids, picture_files([[folder / i] for i in ids]), [found[i] for i in ids], names)


def files_under(top: Path) -> list[Path]:
    """Every file under a folder, without the hidden ones."""
    found: list[Path] = []
    for place, folders, files in os.walk(top, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [Path(place, f) for f in files if not f.startswith(".")]
    return found
