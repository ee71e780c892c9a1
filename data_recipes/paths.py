"""Paths of a task's files, checked to exist and to stay inside the data folder."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from .errors import RecipeError
from .readers import READERS
from .recipe import Recipe


def set_folder(recipe: Recipe, data_root: str | Path | None) -> Path:
    """Return the folder of a task's files: under the data root, else next to the user's YAML.

    Raises:
        RecipeError: no data root is given, or the folder does not exist.
    """
    path = own_path(recipe)
    if not path.is_absolute():
        base = Path(data_root).expanduser() if data_root is not None else recipe.folder
        if base is None:
            raise RecipeError(
                f"recipe '{recipe.name}' reads files from '{path}' under a data root, and none is given",
                "give the folder that holds it with --data-root",
            )
        path = base / path
    if not os.path.isdir(path):
        raise RecipeError(
            f"the data of '{recipe.name}' is not there: no folder '{path}'",
            "give the folder that holds it with --data-root",
        )
    return path


def own_path(recipe: Recipe) -> Path:
    """Return the path, or Hub id, that a recipe names.

    Raises:
        RecipeError: it names none, and leaves it to the user.
    """
    path = recipe.source["path"]
    if not isinstance(path, str) or not path:
        raise RecipeError(
            f"recipe '{recipe.name}' does not say where its data is (source.path is {path!r})",
            f"write a YAML with 'extends: {recipe.name}' and a 'source:' that names the folder of your files "
            f"(format: {recipe.source['format']}) or a Hub dataset id (format: hub), and use its path as the "
            "task",
        )
    return Path(path).expanduser()


def data_root_of(recipe: Recipe, data_root: str | Path | None) -> Path:
    """Return the folder that no path or link of a task may leave.

    It is the data root, or the task's own folder if that is outside the data root.

    Raises:
        RecipeError: see `set_folder`.
    """
    folder = set_folder(recipe, data_root).resolve()
    root = folder if data_root is None else Path(data_root).expanduser().resolve()
    return root if folder.is_relative_to(root) else folder


def inside(folder: Path, name: str, what: str, root: Path) -> Path:
    """Return `folder / name`, which may be absolute or have `..` if it stays in the root.

    Args:
        folder: the folder.
        name: the path relative to it.
        what: the owner of this path, for errors.
        root: see `data_root_of`; links inside it are followed.

    Raises:
        RecipeError: the path, or a link on it, leaves the root.
    """
    strays = PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
    if "\0" in name or (strays and not Path(os.path.realpath(folder / name)).is_relative_to(root)):
        raise RecipeError(
            f"{what} has the path {name!r}, which leads out of its data folder",
            "use a path inside the folder",
        )
    return within(folder / name, what, root)


def within(path: Path, what: str, *roots: Path) -> Path:
    """Return a path after checking that it leads to a place inside one of some folders.

    Args:
        path: the file or folder; it need not exist.
        what: the owner of this path, for errors.
        roots: the folders, without links.

    Raises:
        RecipeError: it leads elsewhere.
    """
    if "\0" in str(path):
        raise RecipeError(f"{what} has the path {str(path)!r}, which no file can have", "correct the path")
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in roots):
        raise RecipeError(
            f"{what} has the path '{path}', which leads to '{real}' and so out of '{roots[0]}'",
            "put the file itself there, or give a --data-root that holds both",
        )
    return path


def images_folder(recipe: Recipe, split: str, data_root: str | Path | None) -> Path:
    """Return the folder to which the image paths of a split are relative.

    It is `source.images` in the task's folder: one for all splits, or a mapping with one for each; a split
    that the mapping lacks has the format's default.

    Raises:
        RecipeError: the task's folder is missing, or the path leads out of it.
    """
    name = recipe.source["images"]
    if isinstance(name, dict):
        name = name.get(split, READERS[recipe.source["format"]].keys()["images"].default)
    what = f"'source.images' of recipe '{recipe.name}'"
    return inside(set_folder(recipe, data_root), name, what, data_root_of(recipe, data_root))


def split_file(recipe: Recipe, split: str, data_root: str | Path | None) -> Path:
    """Return the only file or folder of a split.

    Raises:
        RecipeError: it is missing, leads out of the task's folder, or the recipe names several.
    """
    files = split_files(recipe, split, data_root)
    if not isinstance(recipe.splits[split], str):
        raise RecipeError(
            f"recipe '{recipe.name}' has {recipe.splits[split]!r} as its {split} split",
            "write one file name as text",
        )
    return files[0]


def split_files(recipe: Recipe, split: str, data_root: str | Path | None) -> list[Path]:
    """Return the files or folders of a split, in the order of the recipe.

    Raises:
        RecipeError: one of them is missing, or leads out of the task's folder.
    """
    folder, root = set_folder(recipe, data_root), data_root_of(recipe, data_root)
    named = recipe.splits[split]
    files = [
        inside(folder, n, f"split '{split}' of recipe '{recipe.name}'", root)
        for n in ([named] if isinstance(named, str) else named)
    ]
    for path in files:
        if os.path.exists(path) and not (path.is_file() or path.is_dir()):
            raise RecipeError(
                f"the {split} split of '{recipe.name}', '{path}', is neither a file nor a folder",
                "correct 'splits' in the recipe",
            )
        if not os.path.exists(path):
            raise RecipeError(
                f"the {split} split of '{recipe.name}' is not there: no '{path}'",
                "add the file, or correct 'splits' in the recipe",
            )
    return files


def describe_error(error: BaseException) -> str:
    """Format an error of another library, short enough for one sentence."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
