"""A run folder read back: its configuration, its identity, and the recipes that it keeps."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_keeplora.config import PER_TASK, ROW_KEYS, ModelConfig, RunConfig, parse_config, read_dumped, with_settings
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.records import read_object, read_record
from llava_keeplora_eval.checkpoints import content_changes, model_content
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.models import resolve_model
from llava_keeplora_recipes import load_recipe
from llava_keeplora_recipes.strict_yaml import is_file_name

logger = logging.getLogger(__name__)

#: In identity.json: what the base model is by content.
BASE = "base"


def load_run(
    run: str | Path, overrides: Sequence[str] = (), data_root: str | None = None, run_plugins: bool = True
) -> RunConfig:
    """The configuration of a run folder, wherever it lies now.

    A recipe file that is not where it was is read from the run folder, which keeps a copy.

    Args:
        run: the folder.
        overrides: `a.b.c=value` strings, as for `load_config`; what the run's results depend on is refused later.
        data_root: the folder with the data sets; the run's own when None.
        run_plugins: see `parse_config`.

    Raises:
        RunError: if the folder is no run's, or its configuration was damaged.
    """
    run = Path(run)
    tree, names = read_dumped(run), read_identity(run)["tasks"]
    where = f"{run / 'config.json'}{' with ' if overrides else ''}{' '.join(overrides)}"
    tree.pop("sequence", None)  # Its tasks are listed.
    try:
        tree["methods"] = {label: _as_written(method, tree) for label, method in tree["methods"].items()}
        tree["tasks"] = [_found(run, task, name) for task, name in zip(tree["tasks"], [*names, *tree["tasks"][len(names) :]])]
        return parse_config(with_settings(tree, overrides, data_root=data_root, output_dir=str(run)), run_plugins)
    except ConfigError as error:
        raise RunError(f"{where}: {error.problem}", error.cure) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{where} is not what a run writes there ({error!r})", "restore it or start over in a new output_dir") from error


def extended(
    run: str | Path, task: str, own: Mapping[str, float] | None = None, overrides: Sequence[str] = (), data_root: str | None = None
) -> RunConfig:
    """The configuration of a run with one more task; the run's own if that task is its last one already, so that a killed extension goes on.

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
                f"{run} has '{name}' as its last task already, with training.{key} {begun} instead of {value}",
                f"leave {PER_TASK[key][1]} out to go on, or fork the run before that task",
            )
    return config


def _as_written(method: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved method as a user writes it, without what it inherits."""
    parts = {name: _own(part, tree["parts"].get(name, {})) for name, part in method["parts"].items()}
    row = {key: method[key] for key in ROW_KEYS if key in method}
    return {"method": method["method"], **method["options"], "parts": parts, "training": _own(method["training"], tree["training"]), **row}


def _own(values: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in inherited or inherited[key] != value}


def _found(run: Path, task: str, name: str) -> str:
    kept = kept_recipe(run, name)
    return str(kept) if is_file_name(task) and not Path(task).is_file() and kept.is_file() else task


def kept_recipe(run: Path, name: str) -> Path:
    """Where a run keeps the recipe of a user's task."""
    return run / "recipes" / f"{file_name(name)}.yaml"


def file_name(task: str) -> str:
    """A task's name as one of a file or folder."""
    return task.replace("/", "-")


def read_identity(run: Path) -> dict[str, Any]:
    """What a run's results depend on, as `RunConfig.identity` gave it when the folder was claimed.

    Raises:
        RunError: if that was damaged.
    """
    identity = read_record(run / "identity.json")
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
    base = read_object(run / "identity.json").get(BASE)
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
        logger.warning("%s was begun by a version that kept no record of its base model; that '%s' is still the same cannot be checked", run, model.name_or_path)
        return
    changed = content_changes(known, content or base_content(model))
    if changed is None:
        logger.warning("%s was begun with a base model from %s; that '%s' is the same cannot be checked",
                       run, "the Hub" if "commit" in known else "a folder", model.name_or_path)
    elif changed:
        raise RunError(
            f"the base model '{model.name_or_path}' is not the one that {run} was begun with ({', '.join(changed)} differ)",
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


def differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves in which two trees of plain data differ: (dotted key, old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new)):
            yield from differences(before, after, f"{where}[{index}]")
    elif old != new:
        yield where, old, new
