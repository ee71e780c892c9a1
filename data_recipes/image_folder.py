"""Reader of folders of images, one per class."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from .decoding import endings
from .errors import RecipeError, collect_errors
from .paths import data_root_of, set_folder, split_file, within
from .recipe import Recipe
from .records import Records, classified, image_files


def read_image_folder(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read `<split folder>/<class>/.../image`; the class is the folder's name.

    datasets' "imagefolder" builder is not used, because it numbers classes alphabetically, drops split
    folders with unknown names, and ignores other files silently. Here these are counted.

    Raises:
        RecipeError: the folder is missing, or an image is in no class folder.
    """
    folder = set_folder(recipe, data_root)
    top, root = split_file(recipe, split, data_root), data_root_of(recipe, data_root)
    paths, left_out = files_under(top, folder)
    suffixes = endings()
    for path in paths:
        if path.suffix.lower() not in suffixes:
            left_out[path.suffix.lower() or "without an ending"].append(path.relative_to(folder).as_posix())

    def labelled(path: Path) -> tuple[str, str]:
        within(path, f"the {split} split of '{recipe.name}'", root)
        refuse_no_text(path)
        parts = path.relative_to(top).parts
        if len(parts) < 2:
            raise RecipeError(
                f"'{path.relative_to(folder)}' of '{recipe.name}' lies in no class folder",
                f"move it to {top.name}/<class>/{path.name}",
            )
        return path.relative_to(folder).as_posix(), parts[0]

    labels = dict(collect_errors(labelled, [p for p in paths if p.suffix.lower() in suffixes], problems))
    ids = sorted(labels)
    # A recipe that takes its classes from the source gets them in alphabetical order.
    names = sorted(set(labels.values())) if recipe.classes is None else None
    return classified(
        ids, image_files([[folder / i] for i in ids]), [labels[i] for i in ids], names, left_out
    )


def files_under(top: Path, folder: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """List every file under a folder; links are followed.

    Hidden files and folders are left out, as are links to a folder that contains them.

    Args:
        top: the folder.
        folder: the folder to which the paths of what is left out are relative.

    Returns:
        the files, and what is left out by kind.

    Raises:
        RecipeError: a folder cannot be listed.
    """
    paths: list[Path] = []
    left_out: dict[str, list[str]] = defaultdict(list)

    def refuse(error: OSError) -> None:
        raise RecipeError(
            f"the folder '{error.filename}' cannot be listed ({error.strerror})", "correct its permissions"
        )

    for place, folders, files in os.walk(top, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        below: list[str] = []
        for name in folders:
            path = os.path.join(place, name)
            back = os.path.islink(path) and os.path.commonpath(
                [real, os.path.realpath(path)]
            ) == os.path.realpath(path)
            kind = "hidden" if name.startswith(".") else "link to a folder around it" if back else None
            (left_out[kind] if kind else below).append(os.path.relpath(path, folder) if kind else name)
        folders[:] = below
        for name in files:
            if name.startswith("."):
                left_out["hidden"].append(os.path.relpath(os.path.join(place, name), folder))
            else:
                paths.append(Path(place, name))
    return paths, left_out


def refuse_no_text(path: Path) -> None:
    """Refuse a file name that is no valid UTF-8, and so cannot be an id.

    Raises:
        RecipeError: the name has bytes that are not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise RecipeError(f"the name of the file {str(path)!r} is no UTF-8", "rename it") from None
