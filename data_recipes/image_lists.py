"""Readers of images with labels in the lines of a list, or in the images' paths."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import RecipeError, collect_errors, nearest
from .image_folder import files_under, refuse_no_text
from .json_files import read_text
from .paths import data_root_of, images_folder, inside, set_folder, split_file, within
from .recipe import Recipe
from .records import Records, classified, image_files

#: The share of the first part of a random split, and the seed of the order that is cut.
SHARE, SEED = 0.8, 42
PARTS = ("first", "rest")


def read_image_list(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read a text file with a line per image, as DTD, Food-101, FGVC-Aircraft and Oxford-IIIT Pet have.

    `source.pattern` is a regular expression that matches a complete line: its group `label` is the class, its
    group `image` followed by `source.suffix` the image's path, relative to `source.images` in the task's
    folder.

    Raises:
        RecipeError: the file is missing, a line does not match, or an image is outside the folder.
    """
    path, root = split_file(recipe, split, data_root), data_root_of(recipe, data_root)
    folder = images_folder(recipe, split, data_root)
    pattern, suffix = re.compile(recipe.source["pattern"]), recipe.source["suffix"] or ""

    def listed(item: tuple[int, str]) -> tuple[str, Path, str]:
        number, line = item
        match = pattern.fullmatch(line)
        if match is None:
            raise RecipeError(
                f"line {number} of {path.name} is {line!r}, which 'source.pattern' of recipe '{recipe.name}' "
                "does not fit",
                "correct the line, or the pattern in the recipe",
            )
        name = (match["image"] or "") + suffix
        image = inside(folder, name, f"line {number} of {path.name}", root)
        # An id must not depend on the folder of the data.
        return os.path.relpath(name, folder) if os.path.isabs(name) else name, image, match["label"] or ""

    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), start=1)]
    images = collect_errors(listed, [item for item in lines if item[1]], problems)
    return _records(images, label_names=sorted({label for _, _, label in images}))


def read_random_split(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read all images under a folder, split at random: a split is `first`, 80 % of them, or the `rest`.

    This is the split of MTIL's code for Caltech101, EuroSAT and SUN397, which have no official one
    (github.com/Thunderbeee/ZSCL): `torch.utils.data.random_split` into int(0.8 n) and the rest, seed 42.
    torchvision lists the first two sets by folder and then by name, as this function does. It lists SUN397 in
    the order of the file system, which differs between machines, so the original split of that set cannot be
    reproduced.

    `source.pattern` is a regular expression that matches an image's complete path in the folder; its group
    `label` is the class. Files that do not match are not part of the set.

    Raises:
        RecipeError: the folder is missing, the recipe names another part, or an image is outside the folder.
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
    images = [
        (name.as_posix(), match["label"] or "")
        for name in sorted(names)
        if (match := pattern.fullmatch(name.as_posix()))
    ]
    matching = {name for name, _ in images}
    if others := [name.as_posix() for name in names if name.as_posix() not in matching]:
        left_out["not in the pattern"] += others

    def located(index: int) -> tuple[str, Path, str]:
        name, label = images[index]
        refuse_no_text(folder / name)
        return name, within(folder / name, f"the {split} split of '{recipe.name}'", root), label

    chosen = collect_errors(located, random_split(len(images))[PARTS.index(part)], problems)
    return _records(chosen, sorted({label for _, label in images}), left_out)


def random_split(count: int) -> tuple[list[int], list[int]]:
    """Split the numbers 0 … count−1 as described in `read_random_split`, each part in ascending order."""
    import torch  # Only this function of the package needs it.

    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED)).tolist()
    size = int(SHARE * count)
    return sorted(order[:size]), sorted(order[size:])


def _records(
    images: list[tuple[str, Path, str]], label_names: list[str], left_out: dict[str, list[str]] | None = None
) -> Records:
    ids = [name for name, _, _ in images]
    paths = [path for _, path, _ in images]
    labels = [label for _, _, label in images]
    return classified(ids, image_files([[path] for path in paths]), labels, label_names, left_out)
