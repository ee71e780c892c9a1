"""The check of a run's settings before its first stage, the same for `train` and `plan`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_keeplora.config import AVERAGED, MethodConfig, RunConfig, deepspeed_config, make_method
from llava_keeplora.deepspeed_zero import loaded_whole
from llava_keeplora.errors import ConfigError
from llava_keeplora.methods import Changed, Layer, Method, model_type
from llava_keeplora.models import Family
from llava_keeplora.start.tasks import Task
from llava_keeplora.start.training_args import check_arguments, planned_arguments
from llava_keeplora_recipes import Recipe


def check_run(
    config: RunConfig,
    family: Family,
    changed: Mapping[str, Changed],
    tasks: Sequence[Task],
    recipes: Sequence[Recipe],
    counts: Sequence[int],
    world: int,
) -> None:
    """Check a run's settings together with its model and data, so that no later stage refuses them.

    Args:
        config: the run's configuration.
        family: the model; its weights are not needed.
        changed: label → the modules that its method changes.
        tasks: the tasks whose data are available: all of them for a start, possibly fewer for a plan.
        recipes: the recipes of all tasks; loaded with the data where these are available.
        counts: number of training examples of each task.
        world: number of processes.

    Raises:
        ConfigError, MethodError, EvalError: naming the setting, the split or the prompt.
    """
    check_rows(config, recipes, family)
    check_shrinking(config)
    deepspeed = deepspeed_config(config) or {}
    sharded = deepspeed.get("zero_optimization", {}).get("stage") == 3
    if sharded and world > 1:
        check_images(tasks)
        _check_alike(config, tasks)
    for label, method in config.methods.items():
        instance = make_method(method)
        _check_statistics(label, instance.least_statistics(changed[label].adapted), config)
        check_processes(label, instance, changed[label].adapted.values(), world, sharded)
        _check_rates(method, deepspeed)
        # transformers remembers the last DeepSpeed configuration of any arguments, and loads weights by it.
        with loaded_whole():
            tasks_with_data = zip(recipes, config.trainings(label), counts, strict=True)
            for recipe, training, count in (task for task in tasks_with_data if task[2]):
                check_arguments(
                    lambda training=training: planned_arguments(training, world),
                    label,
                    training,
                    recipe.name,
                    count,
                    world,
                )


def check_processes(label: str, method: Method, layers: Iterable[Layer], world: int, sharded: bool) -> None:
    """Check that a row runs in this number of processes, and with this sharding.

    Args:
        label: its label.
        method: its method.
        layers: the layers that it adapts.
        world: number of processes.
        sharded: whether ZeRO-3 splits the weights.

    Raises:
        ConfigError: naming the row or the part.
    """
    if method.one_process and world > 1:
        raise ConfigError(
            f"'{label}' averages batches in their order, which {world} processes do not keep",
            "run it in one process",
        )
    if sharded:
        check_auto(layers)


def _check_rates(method: MethodConfig, deepspeed: Mapping[str, Any]) -> None:
    with_rate = [part for part, settings in method.parts.items() if settings.learning_rate is not None]
    if "optimizer" in deepspeed and with_rate:
        raise ConfigError(
            "the DeepSpeed configuration has an optimizer, which uses a single learning rate, but "
            f"methods.{method.label}.parts.{with_rate[0]} has its own",
            "remove `optimizer` and `scheduler` from the DeepSpeed configuration, or `learning_rate` "
            "from `parts`",
        )


def check_shrinking(config: RunConfig) -> None:
    """Check that the guard can make every method's update of a task smaller, if it is to.

    Raises:
        ConfigError: naming a method whose model is not the base plus the sum of its tasks' updates.
    """
    for label, method in config.methods.items() if config.guard and config.guard.shrinks else ():
        made = make_method(method)
        summed = made.mergeable and type(made).combine is Method.combine
        if made.trainable and not made.bound and not summed:
            raise ConfigError(
                f"guard.on_failure is shrink, but '{label}' ({method.method}) is not the base plus the sum "
                "of its tasks' updates, of which one could be made smaller",
                f"set guard.on_failure to rollback, stop or warn, or leave '{label}' out of this run",
            )


def _check_statistics(label: str, needed: int, config: RunConfig) -> None:
    if needed > config.memory.statistics_gb * 1e9:
        raise ConfigError(
            f"memory.statistics_gb is {config.memory.statistics_gb}, which is too little for the feature "
            f"statistics of '{label}'",
            f"set memory.statistics_gb={enough_gb(needed)}, or more",
        )


def enough_gb(needed: int) -> str:
    """Return a number of bytes plus a margin of 10 %, in the form of `memory.statistics_gb`."""
    return f"{1.1 * needed / 1e9:.2g}"


def check_auto(layers: Iterable[Layer]) -> None:
    """Check that no ε_w is `auto` for a run with ZeRO-3, since sharded weights cannot be cut and scored.

    Raises:
        ConfigError: naming the part.
    """
    for layer in layers:
        if "energy_weight" in layer.auto:
            raise ConfigError(
                f"parts.{layer.part}.energy_weight is 'auto', but ZeRO-3 holds the weights in shards, which "
                "can't be cut and scored",
                "set a number, for instance the one that `llava-keeplora analyze` proposes, or use ZeRO-2",
            )


def check_rows(config: RunConfig, recipes: Sequence[Recipe], family: Family) -> None:
    """Check that the model supports the methods' random crops and test prompts.

    Raises:
        ConfigError: if the model supports no training on crops or no averaged prompts.
        EvalError: if a test prompt is too long; names the prompt.
    """
    for label, method in config.methods.items():
        if method.random_resized_crop and (why := family.unsupported.get("random_resized_crop")):
            raise ConfigError(
                f"methods.{label}.random_resized_crop is set, which {why}, but {family.path} is a "
                f"{model_type(family)}",
                f"remove methods.{label}.random_resized_crop",
            )
    rows = {"evaluation": config.evaluation.test_prompts} | {
        f"methods.{label}": method.test_prompts for label, method in config.methods.items()
    }
    section = next((where for where, prompts in rows.items() if prompts == AVERAGED), None)
    if section is None:
        return
    if why := family.unsupported.get("test_prompts"):
        raise ConfigError(
            f"{section}.test_prompts is '{AVERAGED}', which {why}, but {family.path} is a "
            f"{model_type(family)}",
            f"remove {section}.test_prompts",
        )
    for recipe in recipes:
        # Without classes if they are read from data that a plan does not have.
        for template in recipe.test_prompts if recipe.classes else ():
            family.tokens(recipe.class_prompts(template))


def _check_alike(config: RunConfig, tasks: Sequence[Task]) -> None:
    """Check that a step on several tasks' data goes through the same layers in every process.

    Raises:
        ConfigError: if some tasks have images and others have none.
    """
    mixing = [label for label, method in config.methods.items() if make_method(method).mixes]
    with_images = [task.name for task in tasks if any(task.train.image_counts)]
    without = [task.name for task in tasks if task.name not in with_images]
    if mixing and with_images and without:
        raise ConfigError(
            f"'{without[0]}' has no images and '{with_images[0]}' has, but with ZeRO-3 in several processes "
            f"every batch must go through the same layers, and a step of '{mixing[0]}' has both",
            f"use ZeRO-2 or one process, or leave '{mixing[0]}' out",
        )


def check_images(tasks: Sequence[Task]) -> None:
    """Check that all examples of a split, or none, have images; for ZeRO-3 in several processes.

    A batch without images skips the vision encoder, so that processes would gather different weights and wait
    for each other for ever.

    Raises:
        ConfigError: naming the split and how many of its examples have no image.
    """
    for task in tasks:
        for split, data in (("train", task.train), ("test", task.test)):
            without = data.image_counts.count(0)
            if 0 < without < len(data):
                raise ConfigError(
                    f"{without} of the {len(data)} examples of {task.name}/{split} have no image, but with "
                    "ZeRO-3 in several processes every batch must go through the same layers",
                    "use ZeRO-2 or one process, or make two tasks of it",
                )
