"""The tasks of a run: their recipes and data, loaded and checked before anything is computed."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from llava_keeplora.config import HOLDOUT_SEED, DataConfig, RunConfig
from llava_keeplora.objects import Objects
from llava_keeplora_eval.plugins import task_plugins
from llava_keeplora_eval.references import check_references, metric_of
from llava_keeplora_recipes import Recipe, TaskData, load_recipes, load_split
from llava_keeplora_recipes.errors import RecipeError
from llava_keeplora_recipes.repeats import repeats, shared_images

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One task of the sequence.

    Args:
        recipe: its recipe.
        train: the split that it is trained on.
        test: the split that it is scored on.
        held_out: training examples that are neither trained on nor part of the scores; see
            `GuardConfig.held_out`.
    """

    recipe: Recipe
    train: TaskData
    test: TaskData
    held_out: TaskData | None = None

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe.name

    def record(self) -> dict:
        """Return the record of the task in journal and results; `plugins` only if it uses some."""
        plugins = task_plugins(self.recipe)
        held_out = self.held_out
        return {
            "task": self.name,
            "version": self.recipe.version,
            "recipe_fingerprint": self.recipe.fingerprint,
            "train": {
                "n": len(self.train),
                "fingerprint": self.train.fingerprint,
                "dropped": list(self.train.dropped),
            },
            "test": {
                "n": len(self.test),
                "fingerprint": self.test.fingerprint,
                "dropped": list(self.test.dropped),
            },
            **({"held_out": {"n": len(held_out), "fingerprint": held_out.fingerprint}} if held_out else {}),
            **({"plugins": plugins} if plugins else {}),
        }

    def repeats(self) -> list[str]:
        """Return sentences on repeated examples in its data; see `llava_keeplora_recipes.repeats`."""
        sentences = [
            f"{self.name}/{data.split}: {note}" for data in (self.train, self.test) for note in repeats(data)
        ]
        if shared := shared_images(self.test, self.train):
            sentences.append(f"{self.name}/{self.test.split}: {shared}")
        return sentences

    def notes(self) -> list[str]:
        """Return sentences on what a user should check in its data: ignored files, markers, and repeats."""
        notes = [
            (data.split, note)
            for data in (self.train, self.test)
            for note in (data.left_out_note, data.marker_note)
        ]
        return [f"{self.name}/{split}: {note}" for split, note in notes if note] + self.repeats()

    def decoding_note(self) -> str:
        """Return a clause on images that earlier releases decoded differently; empty if there are none."""
        count = len(self.train.decoding_notes) + len(self.test.decoding_notes)
        return (
            f"; {count} of its images have transparency or an EXIF orientation, which earlier releases "
            "ignored"
            if count
            else ""
        )


def load_tasks(config: RunConfig, objects: Objects = Objects()) -> list[Task]:
    """Load and check every task's data, before any weight is loaded; see `load_task`.

    Args:
        config: the run's configuration.
        objects: holds the tables of tasks that the calling program gives.

    Raises:
        RecipeError, EvalError: for mistakes in a recipe, its data or its metric.
        ConfigError: if a task is named twice.
    """
    return [
        load_task(objects.with_tables(recipe), config.data, config.source(index) is None, config.held_out)
        for index, recipe in enumerate(load_recipes(config.tasks), start=1)
    ]


def load_task(recipe: Recipe, data: DataConfig, trained: bool = True, held_out: float = 0.0) -> Task:
    """Load and check one task's data.

    Args:
        recipe: the task's recipe.
        data: how data are read.
        trained: see `load_splits`.
        held_out: share of its training examples that is held out.

    Raises:
        RecipeError: for mistakes in the data.
        EvalError: if the metric cannot be computed here or scores other kinds of tasks, or no answer to the
            test split can satisfy it.
    """
    metric_of(recipe).check_installed()
    train, test = load_splits(data, recipe, trained)
    train, held = hold_out(train, held_out)
    if warning := check_references(test):
        log.warning(warning)
    # The recipe of the loaded data: some class lists are read from the data.
    task = Task(train.recipe, train, test, held)
    for note in task.repeats():
        log.warning(note)
    return task


def load_splits(config: DataConfig, recipe: Recipe, trained: bool = True) -> tuple[TaskData, TaskData]:
    """Load a task's training and test data; with `holdout`, both are taken from the training split.

    What is held out does not depend on `train_examples`, which limits the rest.

    Args:
        config: how data are read.
        recipe: the task's recipe.
        trained: whether the task is trained; otherwise its recipe needs no split `train`, and the training
            data are then empty.

    Raises:
        RecipeError: for mistakes in the recipe's data.
    """
    if not trained and "train" not in recipe.splits and not config.holdout:
        test = load_split(recipe, "test", config.root, config.on_bad_image)
        return test.take([]), test
    train = load_split(recipe, "train", config.root, config.on_bad_image)
    train, test = (
        train.split_holdout(config.holdout, HOLDOUT_SEED)
        if config.holdout
        else (train, load_split(recipe, "test", config.root, config.on_bad_image))
    )
    return limit_examples(train, config.train_examples), test


def hold_out(train: TaskData, share: float) -> tuple[TaskData, TaskData | None]:
    """Return (the training examples, those held out of them); None where there is nothing to hold out.

    Args:
        train: a task's training examples.
        share: `guard.held_out`, of a guard that shrinks updates; 0 without one.

    Raises:
        RecipeError: there are too few of them.
    """
    if not share or not len(train):
        return train, None
    try:
        return train.split_holdout(share, HOLDOUT_SEED)
    except RecipeError as error:
        raise RecipeError(
            f"guard.on_failure is 'shrink', for which examples are held out, but {error.problem}",
            "use more examples, or set guard.on_failure to rollback",
        ) from error


def limit_examples(train: TaskData, limit: int) -> TaskData:
    """Return about `limit` examples (0: all), the same share and at least one of every class."""
    return train.split_holdout(limit / len(train), HOLDOUT_SEED)[1] if 0 < limit < len(train) else train
