"""What a run takes from the program that calls it instead of from files: models, datasets, callbacks."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora.files import write_bytes
from llava_keeplora.run_folder import file_name
from llava_keeplora_recipes import Recipe, RecipeError, load_recipe

if TYPE_CHECKING:
    from llava_keeplora.models import GivenModel

#: Task → split → its `datasets.Dataset`.
Tables = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Objects:
    """Objects of the calling program; a run of files alone has none.

    Args:
        tables: task → split → its `datasets.Dataset`.
        callbacks: of transformers' Trainer, instances or classes, for the training of every task.
        given: a model with its processor.
    """

    tables: Tables = field(default_factory=dict)
    callbacks: tuple[Any, ...] = ()
    given: GivenModel | None = None

    def with_tables(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the tables of its task."""
        return replace(recipe, tables=self.tables[recipe.name]) if recipe.name in self.tables else recipe

    def callback_names(self) -> dict[str, list[str]]:
        """Return what the journal says of the callbacks: their classes' names; nothing without any."""
        names = [getattr(callback, "__name__", type(callback).__name__) for callback in self.callbacks]
        return {"callbacks": names} if names else {}


class DatasetRecipes:
    """Recipes of given datasets, as files until a run folder has its copies.

    Args:
        needed: the splits that a run reads.
    """

    def __init__(self, needed: Collection[str]):
        self.needed = needed
        self._folder = tempfile.TemporaryDirectory(prefix="llava-keeplora-")

    def add(self, name: str, given: Any, extends: str | None = None) -> tuple[str, Mapping[str, Any]]:
        """Write the recipe of a given dataset.

        Args:
            name: the task's name.
            given: see `llava_keeplora_recipes.dataset_objects.split_given`.
            extends: a user's recipe for it.

        Returns:
            its file, and its tables by split.

        Raises:
            RecipeError: for mistakes in what is given.
            ConfigError: a split that a run reads is missing.
        """
        # They import datasets, which takes over a second and which a run of files may not need.
        from llava_keeplora_recipes.dataset_objects import recipe_facts, split_given
        from llava_keeplora_recipes.strict_yaml import dump_yaml

        tables, facts = split_given(name, given)
        if missing := [split for split in self.needed if split not in tables]:
            raise ConfigError(
                f"the dataset '{name}' has no split '{missing[0]}' but {', '.join(tables)}, and a run reads "
                f"{' and '.join(self.needed)}",
                "give dataset.train_test_split(test_size=0.2), or set data.holdout, which scores a part of "
                "the training data",
            )
        if extends is not None:
            facts = {"extends": str(Path(extends).absolute())} | facts
        path = Path(self._folder.name) / f"{file_name(name)}.yaml"
        write_bytes(path, dump_yaml(recipe_facts(name, tables, facts)).encode())
        try:
            load_recipe(path)
        except RecipeError as error:
            where = f"the recipe of the dataset '{name}'"
            problem, cure = (text.replace(str(path), where) for text in (error.problem, error.cure))
            raise ConfigError(problem.replace(path.name, where), cure) from error
        return str(path), tables


def check_names(given: Iterable[str], tasks: Collection[str]) -> None:
    """Check that every given dataset is one of a run's tasks.

    Raises:
        ConfigError: naming the first one that is not.
    """
    for name in given:
        if name not in tasks:
            raise ConfigError(f"datasets names '{name}', which is no task of the run", nearest(name, tasks))


def check_recorded(recipe: Recipe, given: Any, recipes: DatasetRecipes) -> Mapping[str, Any]:
    """Return the tables of a task of an opened run, after checking that they go with its recipe.

    Raises:
        ConfigError: the run reads the task's data from files, or was begun with another recipe.
    """
    if recipe.source["format"] != "dataset":
        raise ConfigError(
            f"datasets names '{recipe.name}', whose data the run reads from files ({recipe.format_name})",
            "leave it out, or start another run with the dataset",
        )
    from llava_keeplora_recipes.dataset_objects import split_given

    tables, facts = split_given(recipe.name, given)
    if facts and load_recipe(recipes.add(recipe.name, given)[0]).fingerprint != recipe.fingerprint:
        raise ConfigError(
            f"the recipe of '{recipe.name}' ({', '.join(facts)}) is not the one that the run was begun with",
            "give the dataset alone, for which the run's own recipe counts",
        )
    return tables


def checked_callbacks(callbacks: Iterable[Any]) -> tuple[Any, ...]:
    """Return callbacks as a tuple.

    Raises:
        ConfigError: one is no callback of transformers' Trainer.
    """
    from transformers import TrainerCallback

    for callback in (checked := tuple(callbacks)):
        cls = callback if isinstance(callback, type) else type(callback)
        if not issubclass(cls, TrainerCallback):
            raise ConfigError(
                f"callbacks holds {callback!r}, which is no transformers.TrainerCallback",
                "derive its class from TrainerCallback",
            )
    return checked
