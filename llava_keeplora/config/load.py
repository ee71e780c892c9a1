"""Loading of a run's configuration: YAML, overrides of the command line, and checks of every key."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Mapping
from typing import Any

from llava_keeplora.coerce import as_mapping, build, check_keys, coerce_value
from llava_keeplora.config.checks import (
    check_adopting,
    check_full_finetuning,
    check_own_optimizer,
    check_tasks,
    deepspeed_config,
)
from llava_keeplora.config.expected import ExpectedConfig
from llava_keeplora.config.guard import GuardConfig
from llava_keeplora.config.parts import PartConfig
from llava_keeplora.config.schema import (
    LABEL,
    OTHER_BUDGET,
    ROW_KEYS,
    TABLE_KEYS,
    ZERO_SHOT,
    EvaluationConfig,
    MethodConfig,
    RunConfig,
)
from llava_keeplora.config.shipped import find_config
from llava_keeplora.config.training_args import check_training
from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora.registries import METHODS, localize_plugins, safe_label
from llava_keeplora.run_folder import RENAMED_PARTS, RUN_FILES, rename_parts
from llava_keeplora_recipes import load_sequence
from llava_keeplora_recipes.errors import RecipeError
from llava_keeplora_recipes.recipe_rules import MAX_NAME
from llava_keeplora_recipes.registry import PluginError, UnknownNameError
from llava_keeplora_recipes.strict_yaml import MAX_DEPTH, parse_yaml, read_mapping

#: The methods of a run whose configuration names none.
DEFAULT_METHODS: Mapping[str, Any] = {"keeplora": {}}


def load_config(name_or_path: str, overrides: typing.Sequence[str] = (), **direct: Any) -> RunConfig:
    """Read a run's YAML, apply dotted overrides, and check every key.

    Args:
        name_or_path: a YAML file, or the name of a shipped configuration (`llava-keeplora list`).
        overrides: `a.b.c=value` strings; the value is read as YAML.
        direct: values that take precedence over both: `output_dir`, `data_root` (sets `data.root`), and
            `methods`, the labels of the methods to keep.

    Raises:
        ConfigError: for a missing file, an unknown key, or a value of the wrong type or range.
    """
    return finish_config(read_config(name_or_path), overrides, **direct)


def read_config(name_or_path: str) -> dict[str, Any]:
    """Read a configuration as plain data without checking its keys; see `load_config`."""
    path = find_config(name_or_path)
    try:
        return localize_plugins(read_mapping(path), path.parent)
    except RecipeError as error:
        raise ConfigError(error.problem, error.cure) from error


def finish_config(tree: dict[str, Any], overrides: typing.Sequence[str] = (), **direct: Any) -> RunConfig:
    """Build a `RunConfig` from plain data and the settings of the command line; see `load_config`."""
    return parse_config(with_settings(tree, overrides, **direct))


def with_settings(
    tree: dict[str, Any], overrides: typing.Sequence[str] = (), **direct: Any
) -> dict[str, Any]:
    """Set the settings of the command line in plain data and return it; see `load_config`."""
    tree = rename_parts(tree)
    for override in overrides:
        _apply_override(tree, override)
    if direct.get("data_root"):
        tree["data"] = as_mapping(tree.get("data"), "data") | {"root": direct["data_root"]}
    if direct.get("output_dir"):
        tree["output_dir"] = direct["output_dir"]
    if direct.get("methods") is not None:
        _keep_methods(tree, direct["methods"])
    return tree


def only_methods(methods: Mapping[str, Any], labels: typing.Sequence[str]) -> dict[str, Any]:
    """Select methods by label, in the configuration's order; `zero-shot` may be named too.

    Raises:
        ConfigError: for a label that the configuration does not have.
    """
    labels = [safe_label(label) for label in labels]
    for label in labels:
        if label not in (ZERO_SHOT, *methods):
            raise ConfigError(f"the configuration has no method '{label}'", nearest(label, list(methods)))
    return {label: value for label, value in methods.items() if label in (ZERO_SHOT, *labels)}


def _keep_methods(tree: dict[str, Any], labels: typing.Sequence[str]) -> None:
    """Keep only these methods of a run's configuration, and their published figures."""
    labels = [safe_label(label) for label in labels]
    tree["methods"] = only_methods(as_mapping(tree.get("methods", DEFAULT_METHODS), "methods"), labels)
    if isinstance(tree.get("expected"), Mapping):
        tree["expected"] = {
            label: value for label, value in tree["expected"].items() if label in (ZERO_SHOT, *labels)
        }
    if isinstance(tree.get(OTHER_BUDGET), list):
        tree[OTHER_BUDGET] = [label for label in tree[OTHER_BUDGET] if label in labels]


def parse_config(tree: Mapping[str, Any], run_plugins: bool = True, recorded: bool = False) -> RunConfig:
    """Build a `RunConfig` from plain data; see `load_config`.

    Args:
        tree: the configuration.
        run_plugins: whether plug-ins are imported. If not, their options and the training arguments are
            accepted as recorded, which is for reading an existing run quickly and without its plug-ins.
        recorded: whether it is a run's that exists, whose number of tasks earlier versions did not check.
    """
    tree = rename_parts(localize_plugins(tree))
    for key in TABLE_KEYS:
        if key in tree:
            raise ConfigError(
                f"the key '{key}' makes this a table of several runs", "run it with `llava-keeplora compare`"
            )
    other_budget = tree.pop(OTHER_BUDGET, None)
    check_keys(RunConfig, tree, "")
    parts = {
        name: as_mapping(value, f"parts.{name}")
        for name, value in as_mapping(tree.pop("parts", {}), "parts").items()
    }
    training = as_mapping(tree.pop("training", {}), "training")
    methods = as_mapping(tree.pop("methods", DEFAULT_METHODS), "methods")
    expected = as_mapping(tree.pop("expected", {}), "expected")
    guard = tree.pop("guard", None)
    _read_tasks(tree, training)
    if methods.get(ZERO_SHOT) in (None, {}):
        methods.pop(ZERO_SHOT, None)  # It always comes first, named or not.
    parse_labels(other_budget or [], OTHER_BUDGET, methods)  # It belongs to the table of these rows.
    # The run's own sections first, so that a mistake is reported there and not for the inheriting method.
    run_parts, run_training = (
        {n: build(PartConfig, v, f"parts.{n}") for n, v in parts.items()},
        check_training(training, recorded=not run_plugins),
    )
    evaluation = build(EvaluationConfig, as_mapping(tree.get("evaluation"), "evaluation"), "evaluation")
    parsed = {
        label: _parse_method(
            label, as_mapping(value, f"methods.{label}"), parts, training, evaluation, run_plugins
        )
        for label, value in methods.items()
    }
    config = build(RunConfig, tree, "")
    published = {label: _parse_expected(label, value, parsed) for label, value in expected.items()}
    config = dataclasses.replace(
        config,
        parts=run_parts,
        methods=parsed,
        training=run_training,
        expected=published,
        guard=None if guard is None else build(GuardConfig, as_mapping(guard, "guard"), "guard"),
    )
    for label in parsed:
        config.trainings(label)
    if run_plugins:
        _check_sections(config, recorded)
    return config


def _check_sections(config: RunConfig, recorded: bool) -> None:
    """Make the checks that involve several sections at once; see `parse_config`."""
    # Before DeepSpeed's checks, whose cure is another stage, of which none would do here.
    check_own_optimizer(config)
    deepspeed_config(config)
    check_full_finetuning(config)
    check_adopting(config)
    if not recorded:
        check_tasks(config)


def parse_labels(value: Any, where: str, labels: typing.Iterable[str]) -> tuple[str, ...]:
    """Return a list of methods' labels as a tuple.

    Raises:
        ConfigError: it is no list of labels, or names one that is not there.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(label, str) for label in value):
        raise ConfigError(
            f"{where} is {value!r}, but it takes a list of methods", "write, for instance, [replay]"
        )
    for label in value:
        if label not in labels:
            raise ConfigError(
                f"{where} names '{label}', which the configuration does not have", nearest(label, labels)
            )
    return tuple(value)


def _read_tasks(tree: dict[str, Any], training: dict[str, Any]) -> None:
    """Set `tasks`, and the default for epochs, from the sequence that a configuration names.

    Raises:
        ConfigError: unless exactly one of `sequence` and `tasks` is given, and tasks are a list of names.
    """
    sequence, tasks = tree.get("sequence"), tree.get("tasks")
    if bool(sequence) == bool(tasks):
        raise ConfigError(
            "a run needs either `sequence` or `tasks`" + (", not both" if sequence else ""),
            "name one of them",
        )
    if sequence:
        loaded = load_sequence(sequence)
        tree["tasks"] = list(loaded.tasks)
        if getattr(loaded, "epochs", None):
            training.setdefault("num_train_epochs", list(loaded.epochs))
    if not isinstance(tree["tasks"], (list, tuple)) or not all(
        isinstance(task, str) for task in tree["tasks"]
    ):
        raise ConfigError(
            f"tasks must be a list of names (got {tree['tasks']!r})", "list task names or YAML files"
        )


def _check_label(label: Any) -> None:
    """Check that a method's label can name a folder next to the run's own files.

    Raises:
        ConfigError: naming the label.
    """
    if not isinstance(label, str) or not LABEL.fullmatch(label) or label in RUN_FILES:
        raise ConfigError(
            f"methods has the label '{label}', which cannot be a folder of the run",
            "use letters, digits, '-', '_', '.' and '+'",
        )
    if len(label) > MAX_NAME:
        raise ConfigError(
            f"a method's label names a folder and has at most {MAX_NAME} characters (got {len(label)})",
            "shorten it",
        )


def _parse_method(
    label: str,
    tree: dict[str, Any],
    parts: dict[str, dict],
    training: dict[str, Any],
    evaluation: EvaluationConfig,
    run_plugins: bool = True,
) -> MethodConfig:
    """Build a method's record; it inherits the run's parts and training, except for what it sets itself."""
    where = f"methods.{label}"
    _check_label(label)
    name = tree.pop("method", label)
    name = name if isinstance(name, str) else str(name)
    cls = _find_method(name, where) if run_plugins or not METHODS.is_plugin(name) else None
    if ZERO_SHOT in (label, name):
        raise ConfigError(
            f"{where} sets something for '{ZERO_SHOT}', which has no settings and always comes first",
            f"remove {where}",
        )
    part_overrides = as_mapping(tree.pop("parts", {}), f"{where}.parts")
    for part in part_overrides:
        if parts and part not in parts:
            raise ConfigError(
                f"{where}.parts names '{part}', which the run does not adapt", nearest(str(part), parts)
            )
    adapts = bool(part_overrides) if cls is None else cls.uses_lora
    if part_overrides and not adapts:
        raise ConfigError(
            f"{where}.parts is set, but '{name}' has no adapters on the model's parts",
            f"remove {where}.parts",
        )
    inherited = parts if adapts else {}
    merged = {
        n: {**inherited.get(n, {}), **as_mapping(part_overrides.get(n, {}), f"{where}.parts.{n}")}
        for n in {**inherited, **part_overrides}
    }
    training_overrides = as_mapping(tree.pop("training", {}), f"{where}.training")
    prompts = {"test_prompts": tree.pop("test_prompts")} if "test_prompts" in tree else {}
    test_prompts = (
        build(EvaluationConfig, prompts, where).test_prompts if prompts else evaluation.test_prompts
    )
    crop = coerce_value(
        tree.pop("random_resized_crop", None), tuple[float, float] | None, f"{where}.random_resized_crop"
    )
    keys = ("method", "parts", "training", *ROW_KEYS)
    options = tree if cls is None else dataclasses.asdict(build(cls.Options, tree, where, also=keys))
    settings = dict(
        label=label,
        method=name,
        options=options,
        parts={n: build(PartConfig, v, f"{where}.parts.{n}") for n, v in merged.items()},
        training=check_training(training, recorded=not run_plugins)
        | check_training(training_overrides, f"{where}.training", recorded=not run_plugins),
        test_prompts=test_prompts,
        random_resized_crop=crop,
    )
    try:
        return MethodConfig(**settings)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error.problem}", error.cure) from None


def _find_method(name: str, where: str) -> Any:
    """Return the class of a method, imported if it is a plug-in.

    Raises:
        ConfigError: if there is none of that name, or it cannot be imported.
    """
    try:
        return METHODS[name]
    except UnknownNameError as error:
        raise ConfigError(f"{where} names the method '{name}', which does not exist", error.cure) from None
    except PluginError as error:
        raise ConfigError(f"{where}: {error.problem}", error.cure) from error


def _parse_expected(label: str, tree: Any, methods: Mapping[str, MethodConfig]) -> ExpectedConfig:
    """Build the record of the published figures of one row.

    Raises:
        ConfigError: if the run does not have the row, and its figures may be comparable; or for an invalid
            key or value.
    """
    rows, facts = (ZERO_SHOT, *methods), as_mapping(tree, f"expected.{label}")
    if label not in rows and not facts.get("not_comparable"):
        raise ConfigError(
            f"expected names the row '{label}', which the run does not have", nearest(str(label), rows)
        )
    return build(ExpectedConfig, facts, f"expected.{label}")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            f"the override '{override}' is not of the form key.subkey=value",
            "write, for instance, training.learning_rate=5e-4",
        )
    *parents, leaf = [
        RENAMED_PARTS.get(name, name) if before == "parts" else name
        for before, name in itertools.pairwise(["", *key.split(".")])
    ]
    if len(parents) >= MAX_DEPTH:
        raise ConfigError(
            f"the override '{override}' names a key {len(parents) + 1} levels deep",
            "name a key that the configuration has",
        )
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(
                f"the override '{override}' reaches into '{parent}', which holds {child!r}",
                "name a key that holds a mapping",
            )
        node = child
    try:
        node[leaf] = parse_yaml(value)
    except ValueError as error:
        raise ConfigError(
            f"the override '{override}' has a value that {error}",
            "correct the value, or put quotes around text",
        ) from error
