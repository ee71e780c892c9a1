"""The recipes that a run's guard watches: loaded and checked before anything is computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from llava_keeplora.config import RunConfig, WatchConfig
from llava_keeplora.errors import ConfigError, UserError
from llava_keeplora.guard.watch import check_names, load_watch
from llava_keeplora.objects import Objects
from llava_keeplora.start.tasks import Task
from llava_keeplora_eval.paired_scores import check_comparable
from llava_keeplora_recipes import load_recipe
from llava_keeplora_recipes.repeats import shared_images

log = logging.getLogger(__name__)


def load_watched(config: RunConfig, tasks: Sequence[Task], objects: Objects = Objects()) -> list[Task]:
    """Return the watched recipes with their examples, and no training data; none without a guard.

    Raises:
        ConfigError: the guard can't be evaluated: a recipe is a task of the run or named twice, its data are
            missing, or the change of a score would have no interval.
    """
    if config.guard is None:
        return []
    try:
        watched = [_load(entry, config, objects) for entry in config.guard.watch]
        for task in (*watched, *(tasks if config.guard.judges_tasks else ())):
            check_comparable(task.test)
            if task.held_out is not None:
                check_comparable(task.held_out)
    except UserError as error:
        raise ConfigError(f"the guard can't be evaluated: {error.problem}", error.cure) from error
    check_names([task.name for task in watched], [task.name for task in tasks])
    for task in watched:
        for other in tasks:
            if shared := shared_images(task.test, other.train):
                log.warning("the guard's %s and the training data of %s: %s", task.name, other.name, shared)
    return watched


def _load(entry: WatchConfig, config: RunConfig, objects: Objects) -> Task:
    recipe = objects.with_tables(load_recipe(entry.task))
    data = load_watch(recipe, entry.examples, config.data.root, config.data.on_bad_image)
    return Task(data.recipe, data.take([]), data)
