"""The check of a run before its first stage, the same for `train` and `plan`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from llava_keeplora.config import AVERAGED, RunConfig, deepspeed_config
from llava_keeplora.deepspeed_zero import loaded_whole
from llava_keeplora.errors import ConfigError
from llava_keeplora.methods import METHODS, Changed, Layer, model_type
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
    """Refuse what would be refused, or would go wrong, after the first stage.

    Args:
        config: the run.
        family: its model; its weights are not needed.
        changed: label → what its method changes of the model.
        tasks: those whose data are there: all of them at a start, and for a plan maybe fewer.
        recipes: of every task, as they were loaded with the data where these are there.
        counts: examples that each task trains on.
        world: processes.

    Raises:
        ConfigError, MethodError, EvalError: naming the setting, the split or the prompt.
    """
    check_rows(config, recipes, family)
    deepspeed = deepspeed_config(config) or {}
    sharded = deepspeed.get("zero_optimization", {}).get("stage") == 3
    if sharded and world > 1:
        check_pictures(tasks)
    for label, method in config.methods.items():
        cls = METHODS[method.method]
        made = cls(cls.Options(**method.options))
        _check_statistics(label, made.least_statistics(changed[label].adapted), config)
        if made.one_process and world > 1:
            raise ConfigError(
                f"'{label}' averages batches in their order, which {world} processes don't have",
                "run it in one process",
            )
        if sharded:
            check_auto(changed[label].adapted.values())
        rated = [part for part, own in method.parts.items() if own.learning_rate is not None]
        if "optimizer" in deepspeed and rated:
            raise ConfigError(
                "the DeepSpeed configuration brings its own optimizer, which knows one learning rate, and "
                f"methods.{label}.parts.{rated[0]} has its own",
                "remove `optimizer` and `scheduler` from the DeepSpeed configuration, or `learning_rate` "
                "from `parts`",
            )
        # transformers remembers the last DeepSpeed configuration that arguments were made with, and loads
        # weights by it.
        with loaded_whole():
            for recipe, training, count in zip(recipes, config.trainings(label), counts, strict=True):
                check_arguments(
                    lambda training=training: planned_arguments(training, world),
                    label,
                    training,
                    recipe.name,
                    count,
                    world,
                )


def _check_statistics(label: str, needed: int, config: RunConfig) -> None:
    if needed > config.memory.statistics_gb * 1e9:
        raise ConfigError(
            f"memory.statistics_gb is {config.memory.statistics_gb}, which holds no statistics of the "
            f"features of '{label}'",
            f"set memory.statistics_gb={enough_gb(needed)}, or more",
        )


def enough_gb(needed: int) -> str:
    """So many bytes and a little more, as `memory.statistics_gb` is written."""
    return f"{1.1 * needed / 1e9:.2g}"


def check_auto(layers: Iterable[Layer]) -> None:
    """Refuse to choose ε_w of weights that are in shards.

    Raises:
        ConfigError: naming the part.
    """
    for layer in layers:
        if "energy_weight" in layer.auto:
            raise ConfigError(
                f"parts.{layer.part}.energy_weight is 'auto', and ZeRO-3 holds the weights in shards, which "
                "can't be cut and scored",
                "set a number, for instance the one that `llava-keeplora analyze` proposes, or use ZeRO-2",
            )


def check_rows(config: RunConfig, recipes: Sequence[Recipe], family: Family) -> None:
    """Refuse test prompts and crops that the model cannot use.

    It has no text features to average, the prompts are too long, or it doesn't train on crops.

    Raises:
        ConfigError: for a model that writes its answers.
        EvalError: naming the prompt.
    """
    for label, method in config.methods.items():
        if method.random_resized_crop and (why := family.unsupported.get("random_resized_crop")):
            raise ConfigError(
                f"methods.{label}.random_resized_crop is set, which {why}, and {family.path} is a "
                f"{model_type(family)}",
                f"remove methods.{label}.random_resized_crop",
            )
    rows = {"evaluation": config.evaluation.test_prompts} | {
        f"methods.{label}": method.test_prompts for label, method in config.methods.items()
    }
    asking = next((where for where, prompts in rows.items() if prompts == AVERAGED), None)
    if asking is None:
        return
    if why := family.unsupported.get("test_prompts"):
        raise ConfigError(
            f"{asking}.test_prompts is '{AVERAGED}', which {why}, and {family.path} is a "
            f"{model_type(family)}",
            f"remove {asking}.test_prompts",
        )
    for recipe in recipes:
        for template in (
            recipe.test_prompts if recipe.classes else ()
        ):  # A plan may not have the data that classes are read from.
            family.tokens(recipe.class_prompts(template))  # type: ignore[attr-defined]  # CLIP's alone, see above


def check_pictures(tasks: Sequence[Task]) -> None:
    """Refuse a split in which only some examples have pictures, where processes gather weights together.

    A batch of text alone doesn't go through the vision encoder, so that one process would gather other
    weights than the next one.

    Raises:
        ConfigError: naming the split and how many of its examples have none.
    """
    for task in tasks:
        for split, data in (("train", task.train), ("test", task.test)):
            without = data.image_counts.count(0)
            if 0 < without < len(data):
                raise ConfigError(
                    f"{without} of the {len(data)} examples of {task.name}/{split} have no picture, and with "
                    "ZeRO-3 several processes need "
                    "every batch to go through the same layers",
                    "use ZeRO-2 or one process, or make two tasks of it",
                )
