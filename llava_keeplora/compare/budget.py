"""The budget of training examples of a table's rows: the same for every row, unless the table lists a row.

It is the number of examples that all training steps of a run see, each as often as it is seen: epochs times
examples times tasks, replayed examples and answers of the model's own that a step learns from included.
Passes without an answer to learn (gradients, features, a teacher's forward passes, ZSCL's reference images)
are no part of it; the table lists them in a column of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llava_keeplora.compare.jobs import Job, make_job
from llava_keeplora.compare.table import Table, merged
from llava_keeplora.config import RunConfig, make_method, parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.report.resources import other_budget, usual_budget
from llava_keeplora.steps import Budget

#: Arguments of a training on which its number of examples depends.
SCHEDULE = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "dataloader_drop_last",
)


def check_budgets(table: Table, labels: Mapping[str, Any], tuning: Mapping[str, list[Job]]) -> None:
    """Check that the rows of a table see the same number of training examples, before the first one runs.

    The data are only read where settings or a method's kind make a difference possible.

    Args:
        table: the table.
        labels: label → settings of the rows to check.
        tuning: label → the runs that try its settings.

    Raises:
        ConfigError: naming the rows that train on another number than most, and all numbers.
        RecipeError: the data of a task cannot be read.
    """
    checked = {label: settings for label, settings in labels.items() if label not in table.other_budget}
    sizes: dict[Any, int] = {}
    if table.tuning:
        tried = {
            f"{label} (setting {number})": job
            for label in checked
            for number, job in enumerate(tuning.get(label, ()), start=1)
        }
        _check_order(f"order {table.tuning_order.name} with tuning.holdout", tried, sizes)
    for order in table.orders:
        if order.seeds:
            jobs = {}
            for label, settings in checked.items():
                candidates = (table.tuning.settings[label] if table.tuning else ()) or [{}]
                for number, changes in enumerate(candidates, start=1):
                    name = f"{label} (setting {number})" if len(candidates) > 1 else label
                    chosen = merged(settings, changes)
                    jobs[name] = make_job(table, "budget", order, order.seeds[0], label, chosen)
            _check_order(f"order {order.name}", jobs, sizes)


def _check_order(where: str, jobs: Mapping[str, Job], sizes: dict[Any, int]) -> None:
    """Check the runs of one order; see `check_budgets`.

    Args:
        where: the order, for the error.
        jobs: row → its run.
        sizes: what is known of the tasks' training examples; see `_sizes`.
    """
    configs = {name: (job.label, parse_config(job.tree)) for name, job in jobs.items()}
    if len({_schedule(config, label) for label, config in configs.values()}) < 2:
        return
    counts = {name: trained_examples(config, label, sizes) for name, (label, config) in configs.items()}
    usual = usual_budget(
        counts,
        [
            name
            for name, (label, config) in configs.items()
            if make_method(config.methods[label]).own_examples
        ],
    )
    others = {name: count for name, count in counts.items() if other_budget(count, usual)}
    if others:
        most = next(row for row in counts if counts[row] == usual)
        numbers = [f"'{name}' on {count}" for name, count in others.items()]
        labels = dict.fromkeys(jobs[name].label for name in others)
        raise ConfigError(
            f"on {where}, '{most}' trains on {usual:.0f} examples, but {', '.join(numbers)}, which is no "
            "equal budget",
            f"give all as many, or list rows openly with `other_budget: [{', '.join(labels)}]`, and the "
            "table marks them",
        )


def _schedule(config: RunConfig, label: str) -> str:
    """Return a text that is equal for two rows only if both see as many examples, whatever the data are."""
    method = make_method(config.methods[label])
    trainings = [{key: training.get(key) for key in SCHEDULE} for training in config.trainings(label)]
    added = None if method.own_examples else [label, config.methods[label].options]
    return json.dumps([trainings, added], default=str)


def trained_examples(config: RunConfig, label: str, sizes: dict[Any, int] | None = None) -> int:
    """Return how many examples the training steps of a run will see, each as often as it is seen.

    Args:
        config: the run.
        label: the method's label.
        sizes: holds the tasks' numbers of training examples from call to call.

    Raises:
        RecipeError: the data of a task cannot be read.
    """
    method = make_method(config.methods[label])
    if not method.trainable:
        return 0
    budgets = []
    for training, size in zip(config.trainings(label), _sizes(config, {} if sizes is None else sizes)):
        budgets.append(Budget.of(training, size, 1))
    trained = [index for index in range(1, len(budgets) + 1) if config.source(index) is None]
    further = [method.further_budget(index, budgets) if method.mixes else None for index in trained]
    own = sum(method.budget(index, budgets).seen for index in trained)
    return own + sum(budget.seen for budget in further if budget)


def _sizes(config: RunConfig, sizes: dict[Any, int]) -> list[int]:
    """Return the number of training examples of each task."""
    from llava_keeplora.start.tasks import hold_out, load_splits
    from llava_keeplora_recipes import load_recipes

    result = []
    for index, recipe in enumerate(load_recipes(config.tasks), start=1):
        trained = config.source(index) is None
        key = (recipe.name, recipe.fingerprint, config.data, config.held_out, trained)
        if key not in sizes:
            data = hold_out(load_splits(config.data, recipe, trained)[0], config.held_out)[0]
            # Every caption of an image is learned, and one answer to a question.
            captions = data.recipe.kind == "captioning"
            sizes[key] = sum(map(len, data.answers)) if captions else len(data)
        result.append(sizes[key])
    return result
