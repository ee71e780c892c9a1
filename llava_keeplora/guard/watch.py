"""The examples of a watched recipe."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable

from llava_keeplora.errors import ConfigError
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.references import check_references, metric_inputs, metric_of
from llava_keeplora_recipes import Recipe, TaskData, load_split

log = logging.getLogger(__name__)


def load_watch(
    recipe: Recipe, examples: int | None, data_root: str | None, on_bad_image: str = "refuse"
) -> TaskData:
    """Return the examples of a recipe's `test` by which it is judged.

    Args:
        recipe: the recipe.
        examples: how many at most, see `chosen`; all when None.
        data_root, on_bad_image: see `load_split`.

    Raises:
        RecipeError, EvalError: the data or the metric can't be used.
    """
    metric_of(recipe).check_installed()
    data = load_split(recipe, "test", data_root, on_bad_image)
    if examples is not None and examples < len(data):
        data = chosen(data, examples)
    if warning := check_references(data):
        log.warning(warning)
    return data


def check_names(watched: Iterable[str], tasks: Iterable[str] = (), key: str = "guard.watch") -> None:
    """Refuse a recipe that is watched twice, is a task, or is that of two tasks: a name has one limit.

    Args:
        watched: names of the watched recipes.
        tasks: names of the tasks' recipes.
        key: where the recipes are listed.

    Raises:
        ConfigError: naming the recipe.
    """
    seen: set[str] = set()
    learned: set[str] = set()
    for name in tasks:
        if name in learned:
            raise ConfigError(f"two tasks have the recipe '{name}'", "give one of the two another name")
        learned.add(name)
    for name in watched:
        if name in learned:
            raise ConfigError(
                f"the guard watches '{name}', a task of the run, and no method learns what it watches",
                f"remove it from {key} (old_tasks judges it), or give the recipe another name",
            )
        if name in seen:
            raise ConfigError(
                f"the guard watches '{name}' twice, and each watched recipe has a name of its own",
                f"remove one from {key}, or give one another name",
            )
        seen.add(name)


def chosen(data: TaskData, count: int) -> TaskData:
    """Return at most a number of examples, chosen by a hash of their ids, in the order of the data.

    Examples that the metric scores together stay together (`MetricRecord.units`): the pair of questions on an
    image of MME, the passes of a question of MMBench.

    Raises:
        EvalError: the metric can't group the examples, or the first group has more than `count`.
    """
    ids, record = data.ids, metric_of(data.recipe)
    units = record.units(len(data), **metric_inputs(data, record))
    units.sort(key=lambda unit: hashlib.sha256(ids[unit[0]].encode()).digest())
    ends = itertools.accumulate(map(len, units))
    rows = [row for unit, end in zip(units, ends) if end <= count for row in unit]
    if not rows:
        raise EvalError(
            f"the metric '{record.name}' of {data.recipe.name} scores {len(units[0])} examples together, and "
            f"examples is {count}",
            "choose more examples",
        )
    return data.take(sorted(rows))
