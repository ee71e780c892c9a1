"""Reading of a run folder: its configuration, its identity, and the record of its base model."""

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
    check_adopting,
    check_tasks,
    parse_config,
    with_settings,
    without_idle_options,
)
from llava_keeplora.config.training_args import MACHINE_ARGUMENTS, per_task
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.methods.presets import RULES
from llava_keeplora.records import read_object
from llava_keeplora.registries import plugin_identity
from llava_keeplora.run_folder import (
    BASE,
    CONFIG,
    IDENTITY,
    RECIPES,
    kept_recipe,
    read_dumped,
    read_record,
    rename_parts,
)
from llava_keeplora_eval.content import TENSORS, changes_at, is_object, model_content, tensors_hash
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.models import resolve_model
from llava_keeplora_recipes import load_recipe, load_recipes
from llava_keeplora_recipes.strict_yaml import is_file_name

logger = logging.getLogger(__name__)

#: Settings of methods that older versions did not have → the values with which a run has the identity of one
#: without them. A preset's own `distillation` or `rejection` is the exception: 0 switches it off.
LATER_OPTIONS: dict[str, Sequence[Any]] = {
    "distillation": (0.0, None),
    "feature_rule": ("energy",),
    "plasticity": (20.0,),
    "rejection": (0.0, None),
    "update_bound": (None,),
}
#: Settings of methods whose default was another one in older versions → the default then and now.
CHANGED_DEFAULTS: dict[str, Any] = {"gradient_fraction": (1.0, "auto"), "feature_fraction": (1.0, "auto")}
#: Prefix of the settings with which `routing: model` trains a router. Older versions asked the untouched
#: base, as a run with 0 examples does.
ROUTER, ROUTER_EXAMPLES = "router_", "router_examples"


def run_identity(config: RunConfig) -> dict[str, Any]:
    """Return a run's identity: the part of its configuration on which results depend.

    It excludes paths of the run, recipes and data, caches, published figures, the machines that compute a
    step, and the memory limit of statistics (each task's record says whether features are exact or sketched).

    Tasks are identified by name; the fingerprints in the journal identify their data and recipes, and the
    reference data.

    Raises:
        RecipeError: if a task's recipe is missing or cannot be read, or a task is named twice.
        PluginError: if the source of a plug-in is missing.
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
        tree["evaluation"].pop("generation")  # Older runs, from before it could be set, do not have it.
    if not tree["data"]["train_examples"]:
        tree["data"].pop("train_examples")
    for method in tree["methods"].values():
        options = {key: value for key, value in method["options"].items() if key not in REFERENCE_PLACES}
        method["options"] = _identity_options(options)
    # Defaults of settings that older versions did not have are left out, so that older runs keep their
    # identity.
    for section in (tree["evaluation"], *tree["methods"].values()):
        section.pop("test_prompts") if section["test_prompts"] == ONE else None
    for method in tree["methods"].values():
        method.pop("random_resized_crop") if method["random_resized_crop"] is None else None
    for key in ("family", "parts", "object"):
        tree["model"].pop(key) if tree["model"][key] is None else None
    if tree["model"]["attn_implementation"] == ModelConfig.attn_implementation:
        tree["model"].pop("attn_implementation")
    tree |= _guard_identity(tree.pop("guard"), bool(config.guard and config.guard.shrinks))
    plugin_identity(tree)
    tree["tasks"] = [recipe.name for recipe in load_recipes(config.tasks)]
    # Sources are places, and an update that was taken over is in the run; older runs have no such key.
    if any(adopted := [source is not None for source in tree.pop("adopted")]):
        tree["adopted"] = adopted
    for section in (tree, *tree["methods"].values()):
        lists = {key: per_task(section["training"], key, len(config.tasks)) for key in PER_TASK}
        section["training"] = _machine_independent(section["training"]) | {
            k: values if len(set(values)) > 1 else values[0] for k, values in lists.items()
        }
    return tree


def _guard_identity(guard: dict[str, Any] | None, shrinks: bool) -> dict[str, Any]:
    """Return what results depend on of the guard, as a part of the run's identity; nothing without one."""
    if guard is None:
        return {}
    # What happens after a broken limit may change while a run goes on: the journal says what did.
    guard.pop("on_failure")
    if not shrinks:
        guard.pop("held_out")
    for entry in guard["watch"]:
        entry["task"] = load_recipe(entry["task"]).name
    return {"guard": guard}


def with_recorded_defaults(config: RunConfig) -> RunConfig:
    """Return a configuration whose folder's run goes on as it was begun, where a default has changed since.

    A setting that has its present default keeps the earlier one if the folder's run has recorded that.

    Raises:
        RunError: if the folder's identity is damaged.
    """
    folder = Path(config.output_dir)
    if not ((folder / CONFIG).is_file() and (folder / IDENTITY).is_file()):
        return config
    recorded = read_identity(folder).get("methods")
    methods = {}
    for label, method in config.methods.items():
        section = recorded.get(label) if isinstance(recorded, dict) else None
        options = section.get("options") if isinstance(section, dict) else None
        kept = {
            key: old
            for key, (old, new) in CHANGED_DEFAULTS.items()
            if isinstance(options, dict) and options.get(key) == old and method.options.get(key) == new
        }
        # Its present default is 20, and older versions trained no router.
        if _asks_the_base(options) and method.options.get(ROUTER_EXAMPLES) == 20:
            kept[ROUTER_EXAMPLES] = 0
        methods[label] = dataclasses.replace(method, options={**method.options, **kept})
    return dataclasses.replace(config, methods=methods)


def _identity_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return a method's settings without those that older versions do not have, if they do nothing."""
    rules = RULES.get(str(options.get("preset")), RULES["paper"])
    later = LATER_OPTIONS | {key: (None,) for key in ("distillation", "rejection") if getattr(rules, key) > 0}
    return _without_idle_router({k: value for k, value in options.items() if value not in later.get(k, ())})


def _without_idle_router(options: dict[str, Any]) -> dict[str, Any]:
    """Return a method's settings without those of a router's training where a run trains none."""
    if "routing" not in options or (options["routing"] == "model" and options.get(ROUTER_EXAMPLES)):
        return options
    return {key: value for key, value in options.items() if not key.startswith(ROUTER)}


def _asks_the_base(options: Any) -> bool:
    """Whether the settings that a run has recorded are of one that asks the untouched base for the task."""
    return (
        isinstance(options, dict) and options.get("routing") == "model" and not options.get(ROUTER_EXAMPLES)
    )


def _machine_independent(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return training arguments without those of the machine, with the batch sizes as examples per step."""
    arguments = {key: value for key, value in training.items() if key not in MACHINE_ARGUMENTS}
    parts = (
        training.get("per_device_train_batch_size", 8),
        training.get("gradient_accumulation_steps", 1),
        os.environ.get("WORLD_SIZE", 1),
    )
    return arguments | {"examples_per_step": math.prod(map(int, parts))}


def load_run(
    run: str | Path, overrides: Sequence[str] = (), data_root: str | None = None, run_plugins: bool = True
) -> RunConfig:
    """Load the configuration of a run folder, which may have been moved.

    A recipe file that is no longer where it was is read from the copy in the run folder.

    Args:
        run: the folder.
        overrides: `a.b.c=value` strings, as for `load_config`; changes of the run's identity are refused
            later.
        data_root: the folder with the data sets; as in the run's configuration when None.
        run_plugins: see `parse_config`.

    Raises:
        RunError: if it is not a run folder, or its configuration is damaged.
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
            locate_recipe(run, task, name)
            for task, name in zip(tree["tasks"], [*names, *tree["tasks"][len(names) :]])
        ]
        for entry in (tree.get("guard") or {}).get("watch", ()):
            if is_file_name(entry["task"]) and not Path(entry["task"]).is_file():
                copies = {str(copy.stem): copy for copy in (run / RECIPES).glob("*.yaml")}
                entry["task"] = str(copies.get(Path(entry["task"]).stem, entry["task"]))
        return parse_config(
            with_settings(tree, overrides, data_root=data_root, output_dir=str(run)),
            run_plugins,
            recorded=True,
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
    arguments: Mapping[str, float] | None = None,
    overrides: Sequence[str] = (),
    data_root: str | None = None,
    source: str | None = None,
) -> RunConfig:
    """Return the configuration of a run with one more task.

    If that task is the run's last one already, its configuration is returned unchanged, so that an
    interrupted extension resumes.

    Args:
        run: the folder.
        task: the recipe, by name or file.
        arguments: arguments of `PER_TASK` of the new task alone; others are the same for every task.
        overrides, data_root: see `load_run`.
        source: the adapter or checkpoint that the task's update is adopted from; None if it is trained.

    Raises:
        RunError: see `load_run`; or if the run has that task already, with other arguments or another source.
        RecipeError: if there is no such task.
        ConfigError: if an argument lists a value for each task and `arguments` has none for the new one.
    """
    return followed_by(load_run(run, overrides, data_root), task, arguments, source)


def followed_by(
    config: RunConfig, task: str, arguments: Mapping[str, float] | None = None, source: str | None = None
) -> RunConfig:
    """Return a run's configuration with one more task; see `extended`.

    Raises:
        ConfigError: also if a method cannot take an update over, or has settings for fewer tasks.
    """
    folder = Path(source or "").expanduser()
    source = str(folder.absolute()) if source and folder.exists() else source
    name = load_recipe(task).name
    if load_recipe(config.tasks[-1]).name != name:
        longer = config.followed_by(task, arguments, source)
        check_adopting(longer)
        check_tasks(longer)
        return longer
    recorded_source = config.source(len(config.tasks))
    if source not in (None, recorded_source):
        raise RunError(
            f"{config.output_dir} has '{name}' as its last task already, "
            + (f"adopted from {recorded_source}" if recorded_source else "trained here"),
            "give the task another name, or fork the run before that task",
        )
    for label, (key, value) in itertools.product(config.methods, (arguments or {}).items()):
        recorded = config.trainings(label)[-1].get(key, PER_TASK[key][0])
        if recorded != value:
            raise RunError(
                f"{config.output_dir} has '{name}' as its last task already, with training.{key} "
                f"{recorded} instead of {value}",
                f"leave {PER_TASK[key][1]} out to go on, or fork the run before that task",
            )
    return config


def _without_inherited_values(method: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved method in the form of a configuration, without inherited values."""
    parts = {name: _overridden(part, tree["parts"].get(name, {})) for name, part in method["parts"].items()}
    row = {key: method[key] for key in ROW_KEYS if key in method}
    return {
        "method": method["method"],
        **without_idle_options(method["method"], method["options"]),
        "parts": parts,
        "training": _overridden(method["training"], tree["training"]),
        **row,
    }


def _overridden(values: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in inherited or inherited[key] != value}


def locate_recipe(run: Path, task: str, name: str) -> str:
    """Return a task's recipe, or the run's copy of it if its file is missing."""
    copy = kept_recipe(run, name)
    return str(copy) if is_file_name(task) and not Path(task).is_file() and copy.is_file() else task


def read_identity(run: Path) -> dict[str, Any]:
    """Read a run's identity, as `run_identity` returned it when the folder was claimed.

    Raises:
        RunError: if it is missing or damaged.
    """
    identity = rename_parts(read_record(run / IDENTITY))
    identity.pop(BASE, None)
    # Earlier versions recorded these arguments only if the configuration set them.
    methods = identity.get("methods")
    for section in (identity, *(methods.values() if isinstance(methods, dict) else ())):
        if isinstance(section, dict) and isinstance(section.get("training"), dict):
            for key, (default, _) in PER_TASK.items():
                section["training"].setdefault(key, default)
        if isinstance(section, dict) and isinstance(section.get("options"), dict):
            options = without_idle_options(str(section.get("method")), section["options"])
            section["options"] = _identity_options(options)
    return identity


def base_content(model: ModelConfig) -> dict[str, Any]:
    """Return the record of a base model's content; see `model_content`.

    Raises:
        UserError: if its folder is missing, or a file in it cannot be read.
    """
    model.check_place()
    return model_content(*_place(model))


def base_record(model: ModelConfig, content: dict[str, Any]) -> dict[str, Any]:
    """Return what a run records of its base model: its content, and of a folder the hash of its tensors."""
    if model.object:
        return content
    place = Path(_place(model)[0])
    return content | ({TENSORS: tensors_hash(place)} if place.is_dir() else {})


def _place(model: ModelConfig) -> tuple[str, str | None]:
    return (model.name_or_path if model.object else resolve_model(model.name_or_path)), model.revision


def recorded_base(run: Path) -> dict[str, Any] | None:
    """Return the content of the base model with which a run began; None if a version before 0.2 began it."""
    base = read_object(run / IDENTITY).get(BASE)
    return base if isinstance(base, dict) else None


def base_changes(run: Path, model: ModelConfig, content: Mapping[str, Any] | None = None) -> list[str] | None:
    """Compare a model's content with that of the base model with which a run began.

    Args:
        run: the run folder.
        model: the model.
        content: its `base_content`, if it is known already.

    Returns:
        names of what differs; None if the record cannot be compared or is missing; see `content_changes`.

    Raises:
        UserError: if the model is missing.
    """
    recorded = recorded_base(run)
    if model.object and content is None:
        return None
    return None if recorded is None else changes_at(recorded, *_place(model), content)


def check_base(run: str | Path, model: ModelConfig, content: Mapping[str, Any] | None = None) -> None:
    """Check that base model, processor and template are those with which a run began.

    Args:
        run: the run folder.
        model: the model that is to be loaded now.
        content: its `base_content`, if it is known already.

    Raises:
        RunError: if they differ; names what does.
        UserError: if the model is missing.
    """
    recorded = recorded_base(Path(run))
    if recorded is None:
        logger.warning(
            "%s was begun by a version that kept no record of its base model; whether '%s' is still the "
            "same cannot be checked",
            run,
            model.name_or_path,
        )
        return
    if is_object(recorded) and not model.object:
        return  # A copy of the object as files, which `Run` has compared.
    changed = changes_at(recorded, *_place(model), content)
    if changed is None:
        logger.warning(
            "%s was begun with a base model from %s; whether '%s' is the same cannot be checked",
            run,
            "the Hub" if "commit" in recorded else "a folder",
            model.name_or_path,
        )
    elif changed:
        raise RunError(
            f"the base model '{model.name_or_path}' is not the one that {run} was begun with "
            f"({', '.join(changed)} differ)",
            "restore its files to go on, or start over in a new output_dir",
        )


def check_base_if_here(run: str | Path, model: ModelConfig) -> None:
    """Check the base model like `check_base`, but only warn if it cannot be read on this machine.

    Raises:
        RunError: if it differs; names what does.
    """
    try:
        check_base(run, model)
    except EvalError as error:
        logger.warning("the base model of %s is not checked (%s)", run, error.problem)
