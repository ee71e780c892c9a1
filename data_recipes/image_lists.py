"""Images with their labels in the lines of a list, or in their own paths."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import RecipeError, collect_errors, nearest
from .image_folder import files_under, refuse_no_text
from .json_files import read_text
from .paths import data_root_of, inside, pictures_folder, set_folder, split_file, within
from .recipe import Recipe
from .records import Records, classified, picture_files

#: The share of the first part of a random split, and the seed of the order that is cut.
SHARE, SEED = 0.8, 42
PARTS = ("first", "rest")


def read_image_list(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """A text file with a line per image, as DTD, Food-101, FGVC-Aircraft and Oxford-IIIT Pet have one.

    `source.pattern` is a regular expression for a whole line: its group `label` is the class, its group
    `image` followed by `source.suffix` the image's path, which starts at `source.images` in the task's
    folder.

    Raises:
        RecipeError: the file is missing, a line does not fit, or an image lies elsewhere.
    """
    path, root = split_file(recipe, split, data_root), data_root_of(recipe, data_root)
    folder = pictures_folder(recipe, split, data_root)
    pattern, suffix = re.compile(recipe.source["pattern"]), recipe.source["suffix"] or ""

    def listed(item: tuple[int, str]) -> tuple[str, Path, str]:
        number, line = item
        found = pattern.fullmatch(line)
        if found is None:
            raise RecipeError(
                f"line {number} of {path.name} is {line!r}, which 'source.pattern' of recipe '{recipe.name}' "
                "does not fit",
                "correct the line, or the pattern in the recipe",
            )
        name = (found["image"] or "") + suffix
        place = inside(folder, name, f"line {number} of {path.name}", root)
        # an id is the same wherever the data lies
        return os.path.relpath(name, folder) if os.path.isabs(name) else name, place, found["label"] or ""

    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), start=1)]
    found = collect_errors(listed, [item for item in lines if item[1]], problems)
    return _records(found, label_names=sorted({label for _, _, label in found}))


def read_random_split(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """All images under a folder, cut in two: a split is `first`, 80 % of them at random, or the `rest`.

    It is the cut that MTIL's code makes of Caltech101, EuroSAT and SUN397, which have no official one
    (github.com/Thunderbeee/ZSCL): `torch.utils.data.random_split` into int(0.8 n) and the rest, seed 42.
    torchvision lists the first two by folder and then by name, as is done here. It takes SUN397 in the order
    of the file system, which is another one on every machine, so of that set everyone has an own split.

    `source.pattern` is a regular expression for an image's whole path in the folder, its group `label` the
    class. Files that it does not fit are no part of the set.

    Raises:
        RecipeError: the folder is missing, the recipe names another part, or an image lies elsewhere.
    """
    part = recipe.splits[split]
    if part not in PARTS:
        raise RecipeError(
            f"recipe '{recipe.name}' has {part!r} as its {split} split", nearest(str(part), PARTS)
        )
    folder, root = set_folder(recipe, data_root), data_root_of(recipe, data_root)
    pattern = re.compile(recipe.source["pattern"])
    paths, left_out = files_under(folder, folder)
    names = [path.relative_to(folder) for path in paths]
    found = [
        (name.as_posix(), fit["label"] or "")
        for name in sorted(names)
        if (fit := pattern.fullmatch(name.as_posix()))
    ]
    fitting = {name for name, _ in found}
    if others := [name.as_posix() for name in names if name.as_posix() not in fitting]:
        left_out["not in the pattern"] += others

    def placed(index: int) -> tuple[str, Path, str]:
        name, label = found[index]
        refuse_no_text(folder / name)
        return name, within(folder / name, f"the {split} split of '{recipe.name}'", root), label

    chosen = collect_errors(placed, random_split(len(found))[PARTS.index(part)], problems)
    return _records(chosen, sorted({label for _, label in found}), left_out)


def random_split(count: int) -> tuple[list[int], list[int]]:
    """0 … count−1 cut in two as `read_random_split` says, each part in ascending order."""
    import torch  # Nothing else about data needs it.

    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED)).tolist()
    size = int(SHARE * count)
    return sorted(order[:size]), sorted(order[size:])


def _records(
    found: list[tuple[str, Path, str]], label_names: list[str], left_out: dict[str, list[str]] | None = None
) -> Records:
    ids = [name for name, _, _ in found]
    paths = [path for _, path, _ in found]
    labels = [label for _, _, label in found]
    return classified(ids, picture_files([[path] for path in paths]), labels, label_names, left_out)
