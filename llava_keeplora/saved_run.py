"""A run folder read back: its configuration, what its results depend on, and its base model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_keeplora.config import (
    ONE,
    PER_TASK,
    REFERENCE_PLACES,
    ROW_KEYS,
    ModelConfig,
    RunConfig,
    parse_config,
    with_settings,
)
from llava_keeplora.config.training_args import MACHINE_ARGUMENTS, per_task
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.records import read_object
from llava_keeplora.registries import plugin_identity
from llava_keeplora.run_folder import (
    BASE,
    CONFIG,
    IDENTITY,
    kept_recipe,
    read_dumped,
    read_record,
    rename_parts,
)
from llava_keeplora_eval.content import content_changes, model_content
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.models import resolve_model
from llava_keeplora_recipes import load_recipe, load_recipes
from llava_keeplora_recipes.strict_yaml import is_file_name

logger = logging.getLogger(__name__)


def run_identity(config: RunConfig) -> dict[str, Any]:
    """Return what a result depends on.

    That is everything but where run, recipes and data lie, how they are cached, what was published, on what
    machines a step is computed, and how much memory statistics may take (each task's file says whether
    features are exact or sketched).

    Tasks go by their names here; that a name means the same data and recipe is held by the fingerprints in
    the journal, and so are reference data.

    Raises:
        RecipeError: if a task's recipe is not there or cannot be read, or a task is named twice.
        PluginError: if the source of a plug-in is not there.
    """
    tree = json.loads(json.dumps(dataclasses.asdict(config)))
    places = (
        (tree, "output_dir"),
        (tree, "base_cache"),
        (tree, "sequence"),
        (tree, "expected"),
        (tree["data"], "root"),
        (tree, "memory"),
    )
    for section, key in (*places, (tree["evaluation"], "batch_size"), (tree["data"], "cache_gb")):
        section.pop(key)
    if not tree["evaluation"]["generation"]:
        tree["evaluation"].pop("generation")  # Runs that were begun before it could be set have none.
    for method in tree["methods"].values():
        method["options"] = {
            key: value for key, value in method["options"].items() if key not in REFERENCE_PLACES
        }
    # As before there was a choice, so that older runs keep their identity.
    for section in (tree["evaluation"], *tree["methods"].values()):
        section.pop("test_prompts") if section["test_prompts"] == ONE else None
    for method in tree["methods"].values():
        method.pop("random_resized_crop") if method["random_resized_crop"] is None else None
    for key in ("family", "parts"):
        tree["model"].pop(key) if tree["model"][key] is None else None
    plugin_identity(tree)
    tree["tasks"] = [recipe.name for recipe in load_recipes(config.tasks)]
    for section in (tree, *tree["methods"].values()):
        own = {key: per_task(section["training"], key, len(config.tasks)) for key in PER_TASK}
        section["training"] = _machine_independent(section["training"]) | {
            k: values if len(set(values)) > 1 else values[0] for k, values in own.items()
        }
    return tree


def _machine_independent(training: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments by what a step is.

    Batches per device and process by the examples that they are together.
    """
    kept = {key: value for key, value in training.items() if key not in MACHINE_ARGUMENTS}
    parts = (
        training.get("per_device_train_batch_size", 8),
        training.get("gradient_accumulation_steps", 1),
        os.environ.get("WORLD_SIZE", 1),
    )
    return kept | {"examples_per_step": math.prod(map(int, parts))}


def load_run(
    run: str | Path, overrides: Sequence[str] = (), data_root: str | None = None, run_plugins: bool = True
) -> RunConfig:
    """The configuration of a run folder, wherever it lies now.

    A recipe file that is not where it was is read from the run folder, which keeps a copy.

    Args:
        run: the folder.
        overrides: `a.b.c=value` strings, as for `load_config`; what the run's results depend on is refused
            later.
        data_root: the folder with the data sets; the run's own when None.
        run_plugins: see `parse_config`.

    Raises:
        RunError: if the folder is no run's, or its configuration was damaged.
    """
    run = Path(run)
    tree, names = read_dumped(run), read_identity(run)["tasks"]
    where = f"{run / CONFIG}{' with ' if overrides else ''}{' '.join(overrides)}"
    tree.pop("sequence", None)  # Its tasks are listed.
    try:
        tree["methods"] = {
            label: _without_inherited_values(method, tree) for label, method in tree["methods"].items()
        }
        tree["tasks"] = [
            _found(run, task, name)
            for task, name in zip(tree["tasks"], [*names, *tree["tasks"][len(names) :]])
        ]
        return parse_config(
            with_settings(tree, overrides, data_root=data_root, output_dir=str(run)), run_plugins
        )
    except ConfigError as error:
        raise RunError(f"{where}: {error.problem}", error.cure) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{where} is not what a run writes there ({error!r})",
            "restore it or start over in a new output_dir",
        ) from error


def extended(
    run: str | Path,
    task: str,
    own: Mapping[str, float] | None = None,
    overrides: Sequence[str] = (),
    data_root: str | None = None,
) -> RunConfig:
    """The configuration of a run with one more task.

    The run's own if that task is its last one already, so that a killed extension goes on.

    Args:
        run: the folder.
        task: the recipe, by name or file.
        own: what its training has for itself, by argument of `PER_TASK`; the rest is as for every other task.
        overrides, data_root: see `load_run`.

    Raises:
        RunError: see `load_run`; or that task is there, with other arguments.
        RecipeError: if there is no such task.
        ConfigError: if every task has its own value of such an argument and the new one has none.
    """
    config, name = load_run(run, overrides, data_root), load_recipe(task).name
    if load_recipe(config.tasks[-1]).name != name:
        return config.followed_by(task, own)
    for label, (key, value) in itertools.product(config.methods, (own or {}).items()):
        begun = config.trainings(label)[-1].get(key, PER_TASK[key][0])
        if begun != value:
            raise RunError(
                f"{run} has '{name}' as its last task already, with training.{key} {begun} instead of "
                f"{value}",
                f"leave {PER_TASK[key][1]} out to go on, or fork the run before that task",
            )
    return config


def _without_inherited_values(method: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved method as a user writes it, without what it inherits."""
    parts = {name: _own(part, tree["parts"].get(name, {})) for name, part in method["parts"].items()}
    row = {key: method[key] for key in ROW_KEYS if key in method}
    return {
        "method": method["method"],
        **method["options"],
        "parts": parts,
        "training": _own(method["training"], tree["training"]),
        **row,
    }


def _own(values: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in inherited or inherited[key] != value}


def _found(run: Path, task: str, name: str) -> str:
    kept = kept_recipe(run, name)
    return str(kept) if is_file_name(task) and not Path(task).is_file() and kept.is_file() else task


def read_identity(run: Path) -> dict[str, Any]:
    """What a run's results depend on, as `run_identity` gave it when the folder was claimed.

    Raises:
        RunError: if that was damaged.
    """
    identity = rename_parts(read_record(run / IDENTITY))
    identity.pop(BASE, None)
    # An earlier version named an argument only where a configuration did.
    methods = identity.get("methods")
    for section in (identity, *(methods.values() if isinstance(methods, dict) else ())):
        if isinstance(section, dict) and isinstance(section.get("training"), dict):
            for key, (default, _) in PER_TASK.items():
                section["training"].setdefault(key, default)
    return identity


def base_content(model: ModelConfig) -> dict[str, Any]:
    """Say what a run's base model is by content; see `model_content`.

    Raises:
        UserError: a folder that is not there, or a file of it that cannot be read.
    """
    return model_content(resolve_model(model.name_or_path), model.revision)


def recorded_base(run: Path) -> dict[str, Any] | None:
    """What a run's base model was by content when it began; None where a version before 0.2 began it."""
    base = read_object(run / IDENTITY).get(BASE)
    return base if isinstance(base, dict) else None


def base_changes(run: Path, model: ModelConfig, content: Mapping[str, Any] | None = None) -> list[str] | None:
    """Return what of a model, wherever it lies, differs by content from the one that a run began with.

    Args:
        run: the run folder.
        model: the model.
        content: its `base_content`, where that is known already.

    Returns:
        names of what differs; None where there is no record to compare with; see `content_changes`.

    Raises:
        UserError: if the model is not there.
    """
    known = recorded_base(run)
    return None if known is None else content_changes(known, content or base_content(model))


def check_base(run: str | Path, model: ModelConfig, content: Mapping[str, Any] | None = None) -> None:
    """Refuse another base model, processor or template than the one that a run began with.

    Args:
        run: the run folder.
        model: what is to be loaded now.
        content: its `base_content`, where that is known already.

    Raises:
        RunError: naming what differs.
        UserError: if the model is not there.
    """
    known = recorded_base(Path(run))
    if known is None:
        logger.warning(
            "%s was begun by a version that kept no record of its base model; that '%s' is still the same "
            "cannot be checked",
            run,
            model.name_or_path,
        )
        return
    changed = content_changes(known, content or base_content(model))
    if changed is None:
        logger.warning(
            "%s was begun with a base model from %s; that '%s' is the same cannot be checked",
            run,
            "the Hub" if "commit" in known else "a folder",
            model.name_or_path,
        )
    elif changed:
        raise RunError(
            f"the base model '{model.name_or_path}' is not the one that {run} was begun with "
            f"({', '.join(changed)} differ)",
            "restore its files to go on, or start over in a new output_dir",
        )


def check_base_if_here(run: str | Path, model: ModelConfig) -> None:
    """Refuse another base model as `check_base` does; one that cannot be read here is warned of.

    Raises:
        RunError: naming what differs.
    """
    try:
        check_base(run, model)
    except EvalError as error:
        logger.warning("the base model of %s is not checked (%s)", run, error.problem)
