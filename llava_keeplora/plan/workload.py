"""What every task of a run asks of the machine.

Read from the data where they are there, else from what the recipe says of itself; where it doesn't say how
many examples there are, their number is assumed, and the plan says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from llava_keeplora.config import RunConfig, make_method
from llava_keeplora.errors import ConfigError
from llava_keeplora.methods import Changed
from llava_keeplora.models import Family, Prepared, Work
from llava_keeplora.start import Task, check_run, load_task
from llava_keeplora.start.reference_data import read_general, read_reference
from llava_keeplora_eval.references import metric_of
from llava_keeplora_recipes import Recipe, load_recipe, load_recipes
from llava_keeplora_recipes.errors import RecipeError
from llava_keeplora_recipes.paths import set_folder
from llava_keeplora_recipes.readers import READERS

#: Examples of a split where neither its data nor a published number are known.
ASSUMED = {"train": 100_000, "test": 10_000}


def read_work(config: RunConfig, family: Family, changed: Mapping[str, Changed], world: int) -> list[Work]:
    """Every task of a run, once whatever a start would refuse has been looked for.

    Args:
        config: the run.
        family: the model; its weights are not needed.
        changed: label → what its method changes of the model.
        world: processes.

    Raises:
        RecipeError, EvalError: for a recipe or data that are wrong.
        ConfigError: see `check_run`.
    """
    recipes, root = load_recipes(config.tasks), config.data.root
    tasks = {
        recipe.name: load_task(recipe, config.data, held_out=config.held_out)
        for recipe in recipes
        if _is_there(recipe, root)
    }
    recipes = [tasks[recipe.name].recipe if recipe.name in tasks else recipe for recipe in recipes]
    for recipe in recipes:
        metric_of(recipe).check_installed()
    work = [_read(recipe, tasks.get(recipe.name), config, family, config.held_out) for recipe in recipes]
    for label, method in config.methods.items():
        wanted = make_method(method).reference_data_spec()
        if wanted and not _is_absent(wanted[0], root):
            read_reference(label, *wanted, config.data, family, lambda data: Prepared(family, data))
    check_run(config, family, changed, list(tasks.values()), recipes, [one.train for one in work], world)
    return work


def read_general_work(config: RunConfig, label: str, family: Family) -> Work | None:
    """Return what a method's general data ask of the machine, `test` and answers aside; None for none.

    Raises:
        RecipeError: for a recipe that is wrong.
        ConfigError: if the data are wrong.
    """
    method = make_method(config.methods[label])
    name, root = method.general_data_spec(), config.data.root
    if name is None:
        return None
    if _is_absent(name, root):
        work = _read(load_recipe(name), None, config, family)
    else:
        train = read_general(label, name, config.data, family, lambda data: Prepared(family, data)).data
        work = family.workload(train.recipe, train, train)
    used = method.general_examples(work.train)
    return dataclasses.replace(work, train=used, test=0, images=used)


def _read(
    recipe: Recipe, task: Task | None, config: RunConfig, family: Family, held_out: float = 0.0
) -> Work:
    """Return what a recipe asks of the machine; of absent data, with a share of `train` held out."""
    if not callable(getattr(family, "workload", None)):
        raise ConfigError(
            f"the model family '{family.name}' does not say what a task asks of the machine (`workload`)",
            "run it without a plan",
        )
    if task is not None:
        return family.workload(recipe, task.train, task.test)
    work = family.workload(recipe, None, None)
    train, test = (recipe.expected_sizes.get(split, assumed) for split, assumed in ASSUMED.items())
    assumed = not set(ASSUMED) <= set(recipe.expected_sizes)
    if config.data.holdout:
        train, test = train - round(config.data.holdout * train), round(config.data.holdout * train)
    train = min(train, config.data.train_examples or train)
    train -= round(held_out * train)
    return dataclasses.replace(work, train=train, test=test, images=train + test, assumed=assumed)


def _is_there(recipe: Recipe, root: str | None) -> bool:
    if not READERS[recipe.source["format"]].has_files:
        return True
    try:
        set_folder(recipe, root)
    except RecipeError:
        return False
    return True


def _is_absent(name: str, root: str | None) -> bool:
    """Whether a recipe is there and its data are not."""
    try:
        return not _is_there(load_recipe(name), root)
    except RecipeError:
        return False
