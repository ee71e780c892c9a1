"""Configuration of a table of runs: the settings of one run, and the seeds, orders and tuning on top.

A table's file is a run's file with four optional keys more (`base`, `seeds`, `orders`, `tuning`), so any
run's configuration is a table of one order and one seed.
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
    OTHER_BUDGET,
    PER_TASK,
    TABLE_KEYS,
    RunConfig,
    as_mapping,
    build,
    parse_labels,
    read_config,
    with_settings,
)
from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora.registries import localize_plugins
from llava_keeplora.run_folder import COMPARISON_JSON, COMPARISON_TABLE, RUN_FILES, TRIED
from llava_keeplora_eval.matrix import ZERO_SHOT

#: Metrics by which settings may be chosen: one of them, or a sum such as `transfer+last`.
CHOSEN_BY = ("transfer", "average", "last")
#: The one of them that bounds have, and by which their settings are chosen.
BOUND_METRIC = "last"
#: Folders in a table's folder, next to those of its orders.
TUNING, CACHE = "tuning", "base-cache"
#: Names in a table's folder that no order may take.
TABLE_FILES = (TUNING, CACHE, COMPARISON_TABLE, COMPARISON_JSON, TRIED, *RUN_FILES)


@dataclass(frozen=True)
class Order:
    """An order of the tasks.

    Args:
        name: name of its folder and of its section in the table.
        tasks: the key `sequence` or `tasks` of its runs, with its value.
        seeds: seeds of its runs, by default the table's; none where the order serves the tuning alone.
        epochs: epochs of each task; the methods' settings when empty.
        adopted: for each task, what its update is adopted from, or null; the table's `adopted` when empty.
    """

    name: str
    tasks: dict[str, Any]
    seeds: tuple[int, ...]
    epochs: tuple[float, ...] = ()
    adopted: tuple[str | None, ...] = ()

    def changed(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Return a run's configuration with this order's tasks, epochs and adopted updates."""
        training = {"training": {"num_train_epochs": list(self.epochs)}} if self.epochs else {}
        adopted = {"adopted": list(self.adopted)} if self.adopted else {}
        return merged(run, {**self.tasks, **training, **adopted})


@dataclass(frozen=True)
class Tuning:
    """Choice of each method's settings on a held-out part of the training data, never on test.

    Args:
        settings: label → the settings to try, each with the keys of a method; as many for every method. An
            empty list leaves the method as it is.
        order: the order of tasks on which they are tried; the first one when empty.
        seed: the seed of these runs.
        holdout: share of each task's training split that is held out and scored.
        metric: the metric to maximize: `transfer`, `average`, `last`, or a sum of these such as
            `transfer+last`; bounds are chosen by `last`, their only one.
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
        if len(set(self.metrics)) < len(self.metrics):
            raise ConfigError(f"metric is '{self.metric}', which names one twice", "name each once")

    @property
    def metrics(self) -> list[str]:
        """Names of the aggregates whose sum is maximized."""
        return self.metric.split("+")


@dataclass(frozen=True)
class Table:
    """A table of runs.

    Args:
        output_dir: the table's folder.
        run: the configuration that all runs share, as plain data.
        methods: label → its settings, as under the key `methods` of a run.
        orders: the orders of tasks, in the order of the table.
        tuning: how settings are chosen; None leaves the methods as they are.
        other_budget: labels of the methods that may train on another number of examples than the others.
    """

    output_dir: Path
    run: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    orders: tuple[Order, ...]
    tuning: Tuning | None = None
    other_budget: tuple[str, ...] = ()

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
    """Load a table's YAML file, or a run's; see `load_config`.

    Args:
        name_or_path: a YAML file, or the name of a shipped configuration.
        overrides: `a.b.c=value` strings.
        data_root: the folder with the data sets.
        output_dir: the table's folder.

    Raises:
        ConfigError: a file is missing, a key is unknown, or a value has the wrong type or range.
    """
    tree = with_settings(read_config(name_or_path), overrides, data_root=data_root, output_dir=output_dir)
    return parse_table(localize_plugins(tree))


def parse_table(tree: Mapping[str, Any]) -> Table:
    """Build a `Table` from plain data; see `load_table`. The runs' settings are checked by `make_job`."""
    tree = dict(tree)
    keys = {*TABLE_KEYS, OTHER_BUDGET, *(f.name for f in dataclasses.fields(RunConfig))}
    for key in tree:
        if key not in keys:
            raise ConfigError(f"unknown key '{key}'", nearest(str(key), keys))
    base = tree.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(
            f"base is {base!r}, which is no name",
            "name a configuration or a YAML file, and write a run's keys into the table itself",
        )
    methods = tree.pop("methods", None)
    table_budget = tree.pop(OTHER_BUDGET, None)
    tree = merged(read_config(base), tree) if base else tree
    inherited = tree.pop("methods", DEFAULT_METHODS)
    labels = as_mapping(inherited if methods is None else methods, "methods")
    labels = {
        label: as_mapping(settings, f"methods.{label}")
        for label, settings in labels.items()
        if label != ZERO_SHOT or settings
    }
    tuning, seeds = tree.pop("tuning", None), tree.pop("seeds", None)
    single_seed = tree.pop("seed", 0)
    single_order = {key: tree.pop(key) for key in ("sequence", "tasks") if key in tree}
    tree.pop("expected", None)  # It belongs to one run's settings, not to a table.
    output_dir, orders = tree.pop("output_dir", RunConfig.output_dir), tree.pop("orders", None)
    # Rows of the base that the table leaves out need no word about their budget.
    base_budget = [label for label in tree.pop(OTHER_BUDGET, None) or [] if label in labels]
    other_budget = parse_labels(base_budget if table_budget is None else table_budget, OTHER_BUDGET, labels)
    if not isinstance(output_dir, str) or not output_dir:
        raise ConfigError(
            f"output_dir is {output_dir!r}, which is no folder", "write, for instance, runs/table"
        )
    orders = _parse_orders(
        {"I": single_order} if orders is None else orders,
        _parse_seeds([single_seed] if seeds is None else seeds, "seeds"),
    )
    table = Table(Path(output_dir), tree, labels, orders, None, other_budget)
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
    integers = isinstance(value, (list, tuple)) and all(type(seed) is int for seed in value)
    if not integers or len(value) < least or len(set(value)) < len(value):
        raise ConfigError(
            f"{where} is {value!r}, but it takes a list of different whole numbers",
            "write, for instance, [0, 1, 2]",
        )
    return tuple(value)


def _parse_orders(tree: Any, seeds: tuple[int, ...]) -> tuple[Order, ...]:
    orders, entries = [], as_mapping(tree, "orders")
    if not entries or len({str(name) for name in entries}) < len(entries):
        raise ConfigError(
            f"orders has the names {list(entries)!r}, but a table has one order or more, each with a name of "
            "its own",
            "leave `orders` out for a single one",
        )
    for name, value in entries.items():
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
        adopted = settings.pop("adopted", [])
        if not isinstance(adopted, list) or not all(isinstance(source, str | None) for source in adopted):
            raise ConfigError(
                f"{where}.adopted is {adopted!r}, but it takes a list with an adapter or null for each task",
                "write, for instance, [my-adapter, null]",
            )
        unknown = set(settings) - {"tasks", "sequence"}
        if unknown:
            raise ConfigError(
                f"unknown key '{where}.{min(map(str, unknown))}'",
                nearest(min(map(str, unknown)), ("tasks", "sequence", "seeds", "epochs", "adopted")),
            )
        given = [tasks for tasks in settings.values() if tasks]
        if len(given) != 1 or not isinstance(given[0], (str, list)):
            raise ConfigError(
                f"{where} is {value!r}, which is no order of tasks", "name a sequence, or list the tasks"
            )
        # A run has two keys, `sequence` and `tasks`; an order takes either value under any of them.
        tasks = {"sequence" if isinstance(given[0], str) else "tasks": given[0]}
        orders.append(Order(name, tasks, order_seeds, tuple(epochs), tuple(adopted)))
    return tuple(orders)


def _parse_tuning(tree: dict[str, Any], table: Table) -> Tuning:
    """Parse the section `tuning`, and check that every method has as many settings to try.

    Raises:
        ConfigError: naming the rule that is broken.
    """
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
        if again := next((tried for i, tried in enumerate(settings) if tried in settings[:i]), None):
            raise ConfigError(
                f"tuning.settings.{label} has {again} twice, which are no two settings tried",
                "write other settings in the place of one",
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
    """Raise ConfigError where one list of values per task is used in several orders."""
    if table.run.get("adopted") and len(table.orders) > 1 and not all(o.adopted for o in table.orders):
        raise ConfigError(
            f"adopted lists a source for each task, and the table has {len(table.orders)} orders of them",
            "give each order its own `adopted`",
        )
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
    result = dict(tree)
    for key, value in changes.items():
        sections = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if sections else value
    return result


def dotted(tree: Mapping[str, Any], where: str = "") -> Iterable[str]:
    """Yield settings in the form of the command line, such as `training.learning_rate=0.001`."""
    for key, value in tree.items():
        name = f"{where}{key}"
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{name}.")
        else:
            yield f"{name}={value}"
