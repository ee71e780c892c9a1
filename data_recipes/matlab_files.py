"""Images whose labels lie in MATLAB files: Oxford Flowers and Stanford Cars."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RecipeError, collect_errors
from .file_bytes import read_file
from .labels import as_whole
from .paths import data_root_of, describe_error, inside, pictures_folder, set_folder, split_file
from .recipe import Recipe
from .records import Records, classified, picture_files


def read_flowers(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Oxford Flowers 102: a split is a variable of `setid.mat`, the numbers of its images.

    `imagelabels.mat` has every image's class.

    Raises:
        RecipeError: a file is missing or holds something else, or an image has no label.
    """
    folder = set_folder(recipe, data_root)
    images, root = pictures_folder(recipe, split, data_root), data_root_of(recipe, data_root)
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

    found = collect_errors(numbered, numbers, problems)
    return _records(found, label_names=None)


def read_cars(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Stanford Cars: a split is a file of `annotations` with `fname` and `class`.

    `devkit/cars_meta.mat` has the classes' names.

    Raises:
        RecipeError: a file is missing or holds something else, or an image lies elsewhere.
    """
    path, root = split_file(recipe, split, data_root), data_root_of(recipe, data_root)
    images = pictures_folder(recipe, split, data_root)
    names = _variable(set_folder(recipe, data_root) / "devkit" / "cars_meta.mat", "class_names").tolist()

    def annotated(note: Any) -> tuple[Path, int]:
        if not isinstance(note, dict) or not isinstance(note.get("fname"), str) or "class" not in note:
            raise RecipeError(
                f"{path.name} has an annotation without 'fname' and 'class'",
                "use the file that has the labels",
            )
        return inside(images, note["fname"], path.name, root), _from_one(note["class"], path.name)

    found = collect_errors(annotated, _variable(path, "annotations").tolist(), problems)
    return _records(found, label_names=[str(name) for name in names])


def _variable(path: Path, name: str) -> np.ndarray:
    """A variable of a MATLAB file as an array of one dimension; a struct is a dict.

    Raises:
        RecipeError: the file is missing, is none of MATLAB's, or has no such variable.
    """
    from scipy.io import loadmat  # Slow to import, and only these two sets need it.

    try:
        content = loadmat(
            io.BytesIO(read_file(path)), variable_names=[name], simplify_cells=True, appendmat=False
        )
    except FileNotFoundError as error:
        raise RecipeError(f"there is no '{path}'", "put the file there") from error
    # scipy raises many kinds of error on broken bytes.
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
    # numpy would make columns of a list of dicts' keys
    return np.array(
        [value] if isinstance(value, dict) else value,
        dtype=object if isinstance(value, (dict, list)) else None,
        ndmin=1,
    ).ravel()


def _from_one(label: Any, where: str) -> int:
    """MATLAB counts from one."""
    label = as_whole(label)
    if not isinstance(label, (int, np.integer)) or label < 1:
        raise RecipeError(
            f"{where} has the class {label!r}, and classes count from 1", "replace it by the official file"
        )
    return int(label) - 1


def _records(found: list[tuple[Path, int]], label_names: list[str] | None) -> Records:
    return classified(
        [path.name for path, _ in found],
        picture_files([[path] for path, _ in found]),
        [label for _, label in found],
        label_names,
    )
