"""The formats that a recipe's source can have, and the reader of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .coco import read_coco
from .conversations import read_llava, read_messages
from .errors import RecipeError
from .image_folder import read_image_folder
from .image_lists import read_image_list, read_random_split
from .matlab_files import read_cars, read_flowers
from .pixel_arrays import read_cifar, read_idx
from .records import Records
from .tables import read_hub, read_parquet

if TYPE_CHECKING:
    from .recipe import Recipe

READERS: dict[str, Callable[[Recipe, str, str | Path | None, list[RecipeError] | None], Records]] = {
    "parquet": read_parquet,
    "hub": read_hub,
    "imagefolder": read_image_folder,
    "llava_json": read_llava,
    "messages": read_messages,
    "coco_captions": read_coco,
    "image_list": read_image_list,
    "random_split": read_random_split,
    "cifar_python": read_cifar,
    "idx": read_idx,
    "flowers_mat": read_flowers,
    "cars_mat": read_cars,
}


def read_records(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read one split of a recipe whose examples lie in files or on the Hub.

    Args:
        problems: collects what is wrong with single records, which are left out; None raises.

    Raises:
        RecipeError: the data root, a file, a column or a field is missing or malformed.
    """
    return READERS[recipe.source["format"]](recipe, split, data_root, problems)
