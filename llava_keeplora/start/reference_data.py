"""Reading of data other than the tasks' that methods use: reference data and general data.

Reference data are images and texts without labels, see `llava_keeplora.methods.Reference`; on general data a
method trains as on a task's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_keeplora.config import DataConfig
from llava_keeplora.errors import ConfigError, UserError
from llava_keeplora.methods import Reference
from llava_keeplora.models import ClipFamily, Family, Images, Inputs
from llava_keeplora_recipes import TaskData, load_recipe, load_split
from llava_keeplora_recipes.json_files import read_text

SPLIT = "train"
CURE = "give a text file with one caption per line"


def read_reference(
    label: str,
    recipe: str,
    file: str | None,
    config: DataConfig,
    family: ClipFamily,
    images: Callable[[TaskData], Images],
) -> Reference:
    """Read a recipe's training images, and the texts of a file or of the recipe itself.

    Args:
        label: the method's label, for error messages.
        recipe: name or file of the recipe of the images; its labels are ignored.
        file: a file with one text per line; None for the recipe's class prompts or answers.
        config: its root is where relative paths start.
        family: the model; its weights are not needed.
        images: a split → its preprocessed images.

    Raises:
        ConfigError: if the data are missing or cannot be used; names the option.
    """
    option = "reference"
    try:
        data = load_split(load_recipe(recipe), SPLIT, config.root, config.on_bad_image)
        option = "reference" if file is None else "reference_texts"
        texts = _recipe_texts(data) if file is None else _lines(Path(config.root or "", file))
        tokens = _tokens(family, texts)
    except UserError as error:
        raise ConfigError(f"methods.{label}.{option}: {error.problem}", error.cure) from None
    record = {
        "recipe": data.recipe.name,
        "images": len(data),
        "fingerprint": data.fingerprint,
        "texts": len(texts),
        "texts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
    }
    return Reference(images(data).take, len(data), tokens, record)


@dataclass(frozen=True)
class GeneralData:
    """Training data of a recipe that is no task of the run.

    Args:
        data: the split.
        inputs: the same as the model takes them.
        record: what identifies the data, for the journal.
    """

    data: TaskData
    inputs: Inputs
    record: dict[str, Any]


def read_general(
    label: str, recipe: str, config: DataConfig, family: Family, images: Callable[[TaskData], Images]
) -> GeneralData:
    """Read the training data of a recipe, on which a method trains as on a task's.

    Args:
        label: the method's label, for error messages.
        recipe: name or file of the recipe.
        config: its root is where relative paths start.
        family: the model; its weights are not needed.
        images: a split → its preprocessed images.

    Raises:
        ConfigError: if the data are missing, or the model cannot learn from them; names the option.
    """
    try:
        data = load_split(load_recipe(recipe), SPLIT, config.root, config.on_bad_image)
        if data.recipe.kind not in family.kinds:
            raise ConfigError(
                f"{data.recipe.name} is {data.recipe.kind}, and this model learns {', '.join(family.kinds)}",
                "name a recipe of another kind",
            )
        inputs = family.inputs(data, images(data))
    except UserError as error:
        raise ConfigError(f"methods.{label}.general: {error.problem}", error.cure) from None
    record = {"recipe": data.recipe.name, "n": len(data), "fingerprint": data.fingerprint}
    return GeneralData(data, inputs, record)


def _recipe_texts(data: TaskData) -> list[str]:
    """Return the class prompts of a classification set, else the distinct answers of its examples."""
    if data.recipe.kind == "classification":
        return data.recipe.prompts
    return list(dict.fromkeys(answer for answers in data.answers for answer in answers))


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in read_text(path).split("\n")]
    except UserError as error:
        raise ConfigError(error.problem, CURE) from error
    if not any(lines):
        raise ConfigError(f"{path} has no line with text", CURE)
    return [line for line in lines if line]


def _tokens(family: ClipFamily, texts: list[str]) -> dict[str, Tensor]:
    try:
        return family.tokens(texts)
    except UserError as error:
        raise ConfigError(error.problem, "shorten this text, or leave it out") from None
