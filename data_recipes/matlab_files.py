"""Readers of images with labels in MATLAB files: Oxford Flowers and Stanford Cars."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RecipeError, collect_errors
from .file_bytes import read_file
from .labels import as_whole
from .paths import data_root_of, describe_error, images_folder, inside, set_folder, split_file
from .recipe import Recipe
from .records import Records, classified, image_files
from .texts import described


def read_flowers(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read Oxford Flowers 102: a split is a variable of `setid.mat`, the numbers of its images.

    `imagelabels.mat` has the class of every image.

    Raises:
        RecipeError: a file is missing or has other content, or an image has no label.
    """
    folder = set_folder(recipe, data_root)
    images, root = images_folder(recipe, split, data_root), data_root_of(recipe, data_root)
    labels = _variable(folder / "imagelabels.mat", "labels").tolist()
    numbers = _variable(folder / "setid.mat", str(recipe.splits[split])).tolist()

    def numbered(number: Any) -> tuple[Path, int]:
        number = as_whole(number)
        if not isinstance(number, int) or not 1 <= number <= len(labels):
            raise RecipeError(
                f"setid.mat names the image {number!r}, and imagelabels.mat has labels of {len(labels)}",
                "use the files of one release",
            )
        return inside(images, f"image_{number:05d}.jpg", "setid.mat", root), _from_one(
            labels[number - 1], "imagelabels.mat"
        )

    return _records(collect_errors(numbered, numbers, problems), label_names=None)


def read_cars(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read Stanford Cars: a split is a file of `annotations` with `fname` and `class`.

    `devkit/cars_meta.mat` has the names of the classes.

    Raises:
        RecipeError: a file is missing or has other content, or an image is outside the folder.
    """
    path, root = split_file(recipe, split, data_root), data_root_of(recipe, data_root)
    images = images_folder(recipe, split, data_root)
    names = _variable(set_folder(recipe, data_root) / "devkit" / "cars_meta.mat", "class_names").tolist()
    for number, name in enumerate(names, start=1):
        if not isinstance(name, str):
            raise RecipeError(
                f"cars_meta.mat has {described(name)} as the name of class {number}",
                "replace it by the official file",
            )

    def annotated(item: tuple[int, Any]) -> tuple[Path, int]:
        number, note = item
        if not isinstance(note, dict) or not isinstance(note.get("fname"), str) or "class" not in note:
            raise RecipeError(
                f"annotation {number} of {path.name} has no 'fname' or no 'class'",
                "use the file that has the labels",
            )
        return inside(images, note["fname"], path.name, root), _from_one(
            note["class"], f"annotation {number} of {path.name}"
        )

    notes = enumerate(_variable(path, "annotations").tolist(), start=1)
    annotations = collect_errors(annotated, notes, problems)
    return _records(annotations, label_names=names)


def _variable(path: Path, name: str) -> np.ndarray:
    """Read a variable of a MATLAB file as a one-dimensional array; structs are dicts.

    Raises:
        RecipeError: the file is missing, is no MATLAB file, or has no such variable.
    """
    from scipy.io import loadmat  # It is slow to import, and only these two sets need it.

    try:
        content = loadmat(
            io.BytesIO(read_file(path)), variable_names=[name], simplify_cells=True, appendmat=False
        )
    except FileNotFoundError as error:
        raise RecipeError(f"there is no '{path}'", "put the file there") from error
    # scipy raises many kinds of errors on damaged bytes.
    except Exception as error:
        raise RecipeError(
            f"{path} cannot be read as a MATLAB file ({describe_error(error)})",
            "replace it by the official file",
        ) from error
    if name not in content:
        raise RecipeError(
            f"{path} has no variable '{name}'",
            "replace it by the official file, or correct 'splits' in the recipe",
        )
    value = content[name]
    # Without the dtype, numpy would convert a list of dicts differently.
    return np.array(
        [value] if isinstance(value, dict) else value,
        dtype=object if isinstance(value, (dict, list)) else None,
        ndmin=1,
    ).ravel()


def _from_one(label: Any, where: str) -> int:
    """Convert a label that counts from one, as MATLAB does, to an index.

    Raises:
        RecipeError: the label is not a whole number of at least 1.
    """
    label = as_whole(label)
    if not isinstance(label, (int, np.integer)) or label < 1:
        raise RecipeError(
            f"{where} has the class {label!r}, and classes count from 1", "replace it by the official file"
        )
    return int(label) - 1


def _records(images: list[tuple[Path, int]], label_names: list[str] | None) -> Records:
    return classified(
        [path.name for path, _ in images],
        image_files([[path] for path, _ in images]),
        [label for _, label in images],
        label_names,
    )
