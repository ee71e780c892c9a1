"""Configuration of a table of runs.

The settings of one run, and the methods, seeds, orders of tasks and tuning that multiply it.

A table's file is a run's file with four keys more (`base`, `seeds`, `orders`, `tuning`), none of which it
must have: any run's configuration is a table of one order and one seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_keeplora.config import (
    DEFAULT_METHODS,
    LABEL,
    PER_TASK,
    TABLE_KEYS,
    RunConfig,
    as_mapping,
    build,
    read_config,
    with_settings,
)
from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora.registries import localize_plugins
from llava_keeplora.run_folder import RUN_FILES
from llava_keeplora_eval.matrix import ZERO_SHOT

#: What a setting may be chosen by; one of them, or a sum such as `transfer+last`.
CHOSEN_BY = ("transfer", "average", "last")
#: Folders of a table, as well as those of its orders.
TUNING, CACHE = "tuning", "base-cache"
#: Names in a table's folder that no order may take.
TABLE_FILES = (TUNING, CACHE, "table.csv", *RUN_FILES)


@dataclass(frozen=True)
class Order:
    """The tasks in one order.

    Args:
        name: of its folder and of its part of the table.
        tasks: `sequence` or `tasks` of its runs.
        seeds: of its runs; none where settings are tried alone.
        epochs: per task; as the methods have them when empty.
    """

    name: str
    tasks: dict[str, Any]
    seeds: tuple[int, ...]
    epochs: tuple[float, ...] = ()

    def changed(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Return a run's configuration with this order's tasks and epochs."""
        training = {"training": {"num_train_epochs": list(self.epochs)}} if self.epochs else {}
        return merged(run, {**self.tasks, **training})


@dataclass(frozen=True)
class Tuning:
    """How each method's settings are chosen: on a held-out part of the training data, never on test.

    Args:
        settings: label → the settings that are tried, each as it would stand below the method; as many for
            every method. An empty list takes the method as it is.
        order: the order of tasks on which they are tried; the first one when empty.
        seed: of these runs.
        holdout: share of each task's training split that is held out and scored.
        metric: what is largest for the chosen one: `transfer`, `average`, `last`, or a sum of these such as
            `transfer+last`.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    order: str = ""
    seed: int = 0
    holdout: float = 0.1
    metric: str = "average"

    def __post_init__(self) -> None:
        if not 0.0 < self.holdout < 1.0:
            raise ConfigError(
                f"holdout is {self.holdout}, but settings are chosen on a part of the training data",
                "set it to, say, 0.1",
            )
        for name in self.metrics:
            if name not in CHOSEN_BY:
                raise ConfigError(
                    f"metric is '{self.metric}'",
                    f"{nearest(name, CHOSEN_BY)}, or a sum of them such as transfer+last",
                )

    @property
    def metrics(self) -> list[str]:
        """Aggregates whose sum decides."""
        return self.metric.split("+")


@dataclass(frozen=True)
class Table:
    """Runs that make one table.

    Args:
        output_dir: the folder of all of them.
        run: what every run has in common, as plain data.
        methods: label → its settings, as below `methods` of a run.
        orders: in the order of the table.
        tuning: how settings are chosen; None takes the methods as they are.
    """

    output_dir: Path
    run: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    orders: tuple[Order, ...]
    tuning: Tuning | None = None

    def order(self, name: str) -> Order:
        """Return one of the orders by its name."""
        return next(order for order in self.orders if order.name == name)

    @property
    def tuning_order(self) -> Order:
        """The order on which settings are tried."""
        return self.order(self.tuning.order) if self.tuning.order else self.orders[0]


def load_table(
    name_or_path: str,
    overrides: Sequence[str] = (),
    data_root: str | None = None,
    output_dir: str | None = None,
) -> Table:
    """Read a table's YAML, or a run's; see `load_config`.

    Args:
        name_or_path: a YAML file, or the name of a shipped configuration.
        overrides: `a.b.c=value` strings.
        data_root: the folder with the data sets.
        output_dir: the table's folder.

    Raises:
        ConfigError: for a missing file, an unknown key, or a value of the wrong type or range.
    """
    tree = with_settings(read_config(name_or_path), overrides, data_root=data_root, output_dir=output_dir)
    return parse_table(localize_plugins(tree))


def parse_table(tree: Mapping[str, Any]) -> Table:
    """Build a `Table` from plain data; what its runs have is checked when they are made. See `load_table`."""
    tree = dict(tree)
    known = {*TABLE_KEYS, *(f.name for f in dataclasses.fields(RunConfig))}
    for key in tree:
        if key not in known:
            raise ConfigError(f"unknown key '{key}'", nearest(str(key), known))
    base = tree.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(
            f"base is {base!r}, which is no name",
            "name a configuration or a YAML file, and write a run's keys into the table itself",
        )
    methods = tree.pop("methods", None)
    tree = merged(read_config(base), tree) if base else tree
    inherited = tree.pop("methods", DEFAULT_METHODS)
    labels = as_mapping(inherited if methods is None else methods, "methods")
    labels = {
        label: as_mapping(settings, f"methods.{label}")
        for label, settings in labels.items()
        if label != ZERO_SHOT or settings
    }
    tuning, seeds = tree.pop("tuning", None), tree.pop("seeds", None)
    own_seed, own_tasks = (
        tree.pop("seed", 0),
        {key: tree.pop(key) for key in ("sequence", "tasks") if key in tree},
    )
    tree.pop("expected", None)  # One configuration's, not a table's.
    place, orders = tree.pop("output_dir", RunConfig.output_dir), tree.pop("orders", None)
    if not isinstance(place, str) or not place:
        raise ConfigError(f"output_dir is {place!r}, which is no folder", "write, for instance, runs/table")
    orders = _parse_orders(
        {"I": own_tasks} if orders is None else orders,
        _parse_seeds([own_seed] if seeds is None else seeds, "seeds"),
    )
    table = Table(Path(place), tree, labels, orders)
    table = (
        dataclasses.replace(table, tuning=_parse_tuning(as_mapping(tuning, "tuning"), table))
        if tuning
        else table
    )
    _check_lists(table)
    for order in table.orders:
        if not order.seeds and not (table.tuning and order == table.tuning_order):
            raise ConfigError(
                f"orders.{order.name} has no seeds, and no settings are tried on it",
                "give it a seed, or name it in tuning.order",
            )
    return table


def _parse_seeds(value: Any, where: str, least: int = 1) -> tuple[int, ...]:
    whole = isinstance(value, (list, tuple)) and all(type(seed) is int for seed in value)
    if not whole or len(value) < least or len(set(value)) < len(value):
        raise ConfigError(
            f"{where} is {value!r}, but it takes a list of different whole numbers",
            "write, for instance, [0, 1, 2]",
        )
    return tuple(value)


def _parse_orders(tree: Any, seeds: tuple[int, ...]) -> tuple[Order, ...]:
    orders, named = [], as_mapping(tree, "orders")
    if not named or len({str(name) for name in named}) < len(named):
        raise ConfigError(
            f"orders has the names {list(named)!r}, but a table has one order or more, each with a name of "
            "its own",
            "leave `orders` out for a single one",
        )
    for name, value in named.items():
        name, where = str(name), f"orders.{name}"
        if not LABEL.fullmatch(name) or name in TABLE_FILES:
            raise ConfigError(
                f"orders has the name '{name}', which cannot be a folder of the table",
                "use letters, digits, '-', '_', '.' and '+'",
            )
        settings = dict(value) if isinstance(value, Mapping) else {"tasks": value}
        order_seeds, epochs = (
            _parse_seeds(settings.pop("seeds", list(seeds)), f"{where}.seeds", least=0),
            settings.pop("epochs", []),
        )
        if not isinstance(epochs, list) or not all(
            type(count) in (int, float) and count > 0 for count in epochs
        ):
            raise ConfigError(
                f"{where}.epochs is {epochs!r}, but it takes a positive number for each task",
                "write, for instance, [1, 3, 0.5]",
            )
        unknown = set(settings) - {"tasks", "sequence"}
        if unknown:
            raise ConfigError(
                f"unknown key '{where}.{min(map(str, unknown))}'",
                nearest(min(map(str, unknown)), ("tasks", "sequence", "seeds", "epochs")),
            )
        given = [tasks for tasks in settings.values() if tasks]
        if len(given) != 1 or not isinstance(given[0], (str, list)):
            raise ConfigError(
                f"{where} is {value!r}, which is no order of tasks", "name a sequence, or list the tasks"
            )
        # A run has either key; a table may name a sequence or list the tasks under one.
        tasks = {"sequence" if isinstance(given[0], str) else "tasks": given[0]}
        orders.append(Order(name, tasks, order_seeds, tuple(epochs)))
    return tuple(orders)


def _parse_tuning(tree: dict[str, Any], table: Table) -> Tuning:
    """Parse the tuning: as many settings for every method."""
    tuning = build(Tuning, tree, "tuning")
    names = [order.name for order in table.orders]
    if tuning.order and tuning.order not in names:
        raise ConfigError(
            f"tuning.order is '{tuning.order}', which the table does not have", nearest(tuning.order, names)
        )
    for label in tuning.settings:
        if label not in table.methods:
            raise ConfigError(
                f"tuning.settings names '{label}', which the table does not have",
                nearest(str(label), table.methods),
            )
    if as_mapping(table.run.get("data"), "data").get("holdout"):
        raise ConfigError(
            "data.holdout is set, so that the table itself would be scored on what its settings are chosen "
            "on",
            "leave it out; tuning.holdout is enough",
        )
    for label in table.methods:
        settings = tuning.settings.get(label)
        if not isinstance(settings, list) or not all(isinstance(tried, Mapping) for tried in settings):
            raise ConfigError(
                f"tuning.settings.{label} is {settings!r}, but it takes a list of settings",
                f"list them, or write `{label}: []` to take it as it is",
            )
    counts = {label: len(tuning.settings[label]) for label in table.methods if tuning.settings[label]}
    if len(set(counts.values())) > 1:
        most, fewest = max(counts, key=counts.get), min(counts, key=counts.get)
        raise ConfigError(
            f"tuning.settings has {counts[most]} settings for '{most}' and {counts[fewest]} for '{fewest}', "
            "which is no equal budget",
            f"give every method as many, or write `{fewest}: []` where there is nothing to tune",
        )
    return tuning


def _check_lists(table: Table) -> None:
    """Raise ConfigError where a list of one value per task is used in several orders."""
    tried = [
        tree for settings in (table.tuning.settings.values() if table.tuning else ()) for tree in settings
    ]
    for order in table.orders:
        if order.epochs and any(
            "num_train_epochs" in as_mapping(tree.get("training"), "training")
            for tree in (*table.methods.values(), *tried)
        ):
            raise ConfigError(
                f"a method has training.num_train_epochs, and orders.{order.name}.epochs sets them for all "
                "methods",
                "leave out one of them",
            )
    listed = [
        key
        for key in PER_TASK
        if len(table.orders) > 1
        and not (key == "num_train_epochs" and all(order.epochs for order in table.orders))
    ]
    for tree in (table.run, *table.methods.values(), *tried):
        for key in listed:
            if isinstance(as_mapping(tree.get("training"), "training").get(key), list):
                raise ConfigError(
                    f"training.{key} lists a number for each task, and the table has {len(table.orders)} "
                    "orders of them",
                    "give one number" + ", or each order its own `epochs`" * (key == "num_train_epochs"),
                )


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with changes; sections are merged, other values replaced."""
    out = dict(tree)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else value
    return out


def dotted(tree: Mapping[str, Any], where: str = "") -> Iterable[str]:
    """Yield settings as the command line takes them: `training.learning_rate=0.001`."""
    for key, value in tree.items():
        name = f"{where}{key}"
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{name}.")
        else:
            yield f"{name}={value}"
