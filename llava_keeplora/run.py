"""A run as an object: what the command line does, from Python, with models and data that a program holds."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from llava_keeplora.config import ModelConfig, RunConfig, deepspeed_config, finish_config, read_config
from llava_keeplora.distributed import all_gather_object, main_process_first
from llava_keeplora.errors import ConfigError
from llava_keeplora.models import GivenModel, open_model
from llava_keeplora.objects import (
    DatasetRecipes,
    Objects,
    Tables,
    check_names,
    check_recorded,
    checked_callbacks,
)
from llava_keeplora.report.run_matrix import RunMatrix
from llava_keeplora.saved_run import check_base, followed_by, load_run
from llava_keeplora.sequence import run
from llava_keeplora.sequence.launch import processes
from llava_keeplora.start.tasks import hold_out, limit_examples, load_splits
from llava_keeplora_eval.predictors import Predictor
from llava_keeplora_recipes import Recipe, TaskData, load_recipe, load_recipes, load_split
from llava_keeplora_recipes.strict_yaml import is_file_name

if TYPE_CHECKING:
    from llava_keeplora.export import AdapterSet, Exported


class Run:
    """A sequence of tasks that a model learns one after the other, in a run folder.

    Making one computes nothing and writes nothing into the folder.

    Args:
        config: the configuration: a `RunConfig`, the same as nested dicts, a YAML file, or the name of a
            shipped one.
        datasets: task → its data: a `datasets.Dataset` (the split `train`), a `DatasetDict`, or a mapping of
            splits that may also have keys of a recipe, such as `prompt`. Without `tasks` or `sequence` in the
            configuration, these are the tasks, in this order.
        model: a model of transformers, in the place of the checkpoint that a configuration names. A run puts
            it on its device and trains on it; after every call it has its own weights again.
        processor: the model's.
        callbacks: callbacks of transformers' Trainer, instances or classes, for the training of every task.
            They may watch, log and stop the program, and must change neither weights nor settings: results
            would no longer follow from the configuration. The journal lists their classes.

    Raises:
        UserError: a mistake in the configuration or in a given object, in one sentence.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any] | str | Path,
        *,
        datasets: Mapping[str, Any] | None = None,
        model: Any = None,
        processor: Any = None,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]] = (),
    ):
        datasets, given = datasets or {}, _given(model, processor)
        config = _parsed(config, list(datasets), given)
        self._recipes = DatasetRecipes(["train"] if config.data.holdout else ["train", "test"])
        tasks, tables = self._dataset_tasks(config.tasks, datasets)
        self.config = dataclasses.replace(config, tasks=tasks)
        self.objects = Objects(tables, checked_callbacks(callbacks), given)
        if given is not None:
            _check_given(self.config, given)
        #: Whether this process is the one that writes and reports, where a launcher started several.
        self.is_main_process = True

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        datasets: Mapping[str, Any] | None = None,
        model: Any = None,
        processor: Any = None,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]] = (),
        overrides: Sequence[str] = (),
        data_root: str | None = None,
    ) -> Run:
        """Open a run folder, of a run that is finished or was stopped.

        Args:
            folder: the run folder; it may have been moved.
            datasets, model, processor, callbacks: see `Run`; those that the run was begun with are needed to
                go on, not to look at results.
            overrides: `a.b.c=value` strings, for settings that depend on the machine.
            data_root: the folder with the data sets; as in the run's configuration when None.

        Raises:
            UserError: it is no run folder, its configuration is damaged, or an object is not the run's.
        """
        config = load_run(folder, overrides, data_root)
        opened = cls(config, callbacks=callbacks, model=model, processor=processor)
        recipes = {recipe.name: recipe for recipe in load_recipes(opened.config.tasks)}
        check_names(datasets or (), recipes)
        tables = {
            name: check_recorded(recipes[name], given, opened._recipes)
            for name, given in (datasets or {}).items()
        }
        opened.objects = dataclasses.replace(opened.objects, tables=tables)
        return opened

    # --- what a run does -------------------------------------------------------------------------------

    def train(self) -> RunMatrix:
        """Train every task, or go on where the run was stopped, and return the scores.

        A program without a launcher trains in one process, with `training.deepspeed` too.

        Raises:
            UserError: for anything that a user can repair; finished stages are kept.
        """
        with processes(self.config) as self.is_main_process:
            return RunMatrix.of(self.folder, run(self.config, self.objects))

    def extend(
        self,
        task: str,
        dataset: Any = None,
        *,
        num_train_epochs: float | None = None,
        learning_rate: float | None = None,
    ) -> RunMatrix:
        """Train one more task, or go on with it, and return the scores.

        Args:
            task: the name of a shipped task, a YAML file, or with `dataset` a name for it.
            dataset: its data; see `datasets` of `Run`.
            num_train_epochs, learning_rate: of this task alone; as for every other when None.

        Raises:
            UserError: the run has that task already with other settings, or see `train`.
        """
        given = {"num_train_epochs": num_train_epochs, "learning_rate": learning_rate}
        arguments = {key: value for key, value in given.items() if value is not None}
        return self._follow(task, dataset, arguments)

    def retry(
        self, task: str, *, num_train_epochs: float | None = None, learning_rate: float | None = None
    ) -> RunMatrix:
        """Learn a task that the guard rolled back once more, as the run's last one, and return the scores.

        Args:
            task: its name.
            num_train_epochs, learning_rate: see `extend`.

        Raises:
            RunError: a method of the run has not rolled it back, or see `extend`.
        """
        from llava_keeplora.sequence.retry import put_back  # Few starts need it.

        given = {"num_train_epochs": num_train_epochs, "learning_rate": learning_rate}
        arguments = {key: value for key, value in given.items() if value is not None}
        with processes(self.config) as self.is_main_process:
            with main_process_first():
                config = put_back(self.config, task, arguments) if self.is_main_process else None
            self.config = all_gather_object(config)[0]
            return RunMatrix.of(self.folder, run(self.config, self.objects))

    def adopt(self, source: str | Path, task: str, dataset: Any = None) -> RunMatrix:
        """Make an update that was trained elsewhere one more task, or go on with it, and return the scores.

        What it does inside of the protected subspace is taken away; the run's record has how much that is.

        Args:
            source: the folder of a PEFT LoRA adapter or of a merged checkpoint of the run's base, or
                `user/name` on the Hub.
            task, dataset: the task that it learned; see `extend`.

        Raises:
            UserError: it is of another base or damaged, cannot be taken over, or see `train`; the run stays
                as it was.
        """
        return self._follow(task, dataset, source=str(source))

    def _follow(
        self,
        task: str,
        dataset: Any,
        arguments: Mapping[str, float] | None = None,
        source: str | None = None,
    ) -> RunMatrix:
        """Add a task to the configuration, with its data if they are given, and run it."""
        tables = dict(self.objects.tables)
        if dataset is not None:
            name = task
            task, tables[name] = self._recipes.add(name, dataset)
        self.config = followed_by(self.config, task, arguments, source)
        self.objects = dataclasses.replace(self.objects, tables=tables)
        return self.train()

    def export(self, form: str, into: str | Path | None = None, **options: Any) -> Exported | AdapterSet:
        """Write what the run learned as an `adapter`, a `set`, a `merged` checkpoint or a `state`, verified.

        Args:
            form: one of these.
            into: a new folder; FOLDER/export/FORM when None.
            options: `label`, `at_task`, `parts`, `rank`, `base_id`, ...; see
                `llava_keeplora.export.export_run` and, for a set, `export_set`.

        Raises:
            UserError: there is nothing to export, or options do not fit; nothing is written.
        """
        from llava_keeplora.export import export_run, export_set  # a start needs none of it

        if self.objects.given is not None and options.get("base_id") is None:
            raise ConfigError(
                f"the base of this run is a {self.config.model.object} in memory, which nobody else can load",
                "give the id on the Hub of the same weights with base_id='user/name'",
            )
        with self._base_files() as base:
            options |= {"objects": self.objects, "base_folder": base}
            if form == "set":
                return export_set(self.folder, into, **options)
            return export_run(self.folder, form, into, **options)

    def predictor(self, task: str, *, label: str | None = None, at_task: int | None = None) -> Predictor:
        """Return the model after some of its tasks, ready to answer a task's examples.

        Args:
            task: a task of the run, or the name or YAML file of any other.
            label: the method's label; None if the run has one method.
            at_task: the last learned task, counted from 1; the last finished one when None.

        Raises:
            UserError: no task is finished, or the method takes more than its files to answer with.
        """
        from llava_keeplora.export import load_run_predictor

        recipe = self._recipe(task)
        if recipe.kind == "classification" and recipe.classes is None:
            recipe = self.data(task).recipe  # Its classes are read from its data.
        with self._base_files() as base:
            return load_run_predictor(self.folder, recipe, label, at_task, base)

    # --- what a run has --------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output_dir)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in order."""
        return [recipe.name for recipe in load_recipes(self.config.tasks)]

    @property
    def matrix(self) -> RunMatrix:
        """The scores so far, also of a run that was stopped.

        Raises:
            RunError: there is none yet, or a file was damaged.
        """
        return RunMatrix.read(self.folder)

    def data(self, task: str, split: str = "test") -> TaskData:
        """Return the examples of a task, as the run reads them.

        Args:
            task: a task of the run, or the name or YAML file of any other.
            split: `train` or `test`; as configured by `data.holdout` and `data.train_examples`.

        Raises:
            RecipeError: for mistakes in the data.
        """
        recipe, data = self._recipe(task), self.config.data
        if data.holdout and split in ("train", "test"):
            train, test = load_splits(data, recipe)
            return test if split == "test" else hold_out(train, self.config.held_out)[0]
        examples = load_split(recipe, split, data.root, data.on_bad_image)
        if split != "train":
            return examples
        return hold_out(limit_examples(examples, data.train_examples), self.config.held_out)[0]

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, tasks={self.tasks}, methods={list(self.config.methods)})"

    @contextmanager
    def _base_files(self) -> Iterator[str | None]:
        """Yield the folder of a copy of the given model while the block runs; None where there is none.

        Raises:
            ConfigError: the run was begun with a model that is not given.
            RunError: the model is not the one that the run was begun with.
        """
        given = self.objects.given
        if given is None:
            self.config.model.check_place()
            yield None
            return
        check_base(self.folder, self.config.model, given.content())
        with tempfile.TemporaryDirectory(prefix="llava-keeplora-") as folder:
            given.save(Path(folder))
            yield folder

    def _recipe(self, task: str) -> Recipe:
        recipes = {recipe.name: recipe for recipe in load_recipes(self.config.tasks)}
        return self.objects.with_tables(recipes[task] if task in recipes else load_recipe(task))

    def _dataset_tasks(
        self, tasks: Sequence[str], datasets: Mapping[str, Any]
    ) -> tuple[tuple[str, ...], Tables]:
        """Return the tasks with the recipes of given datasets in their places, and these datasets' tables."""
        files = {load_recipe(task).name: task for task in tasks if datasets and is_file_name(task)}
        names = [next((name for name, file in files.items() if file == task), task) for task in tasks]
        check_names(datasets, names)
        added = {name: self._recipes.add(name, given, files.get(name)) for name, given in datasets.items()}
        paths = tuple(added[name][0] if name in added else task for name, task in zip(names, tasks))
        return paths, {name: tables for name, (_, tables) in added.items()}


def _given(model: Any, processor: Any) -> GivenModel | None:
    """Return a given model with its processor; None without.

    Raises:
        ConfigError: one is given without the other.
    """
    if (model is None) != (processor is None):
        missing = "processor" if processor is None else "model"
        raise ConfigError(
            f"a model and its processor belong together, and no {missing} is given",
            f"pass {missing}=...; AutoProcessor.from_pretrained loads a processor",
        )
    return None if model is None else GivenModel(model, processor)


def _check_given(config: RunConfig, given: GivenModel) -> None:
    """Check that a given model and its processor can be trained as the configuration says.

    Raises:
        ConfigError: they do not fit one another, are of no supported type, or would have to be sharded.
    """
    open_model(config.model, config.evaluation, given)
    if (deepspeed_config(config) or {}).get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            "training.deepspeed asks for ZeRO-3, which loads a checkpoint in shards, and a whole model is "
            "given",
            "use ZeRO-2, or name the checkpoint under model.name_or_path",
        )


def _parsed(
    config: RunConfig | Mapping[str, Any] | str | Path, datasets: Sequence[str], given: GivenModel | None
) -> RunConfig:
    """Return a configuration as a `RunConfig`, with a given model, and datasets as tasks where it names none.

    Raises:
        ConfigError: it names a model, and another is given.
    """
    named, recorded = None, None
    if isinstance(config, RunConfig):
        parsed, recorded = config, config.model.object
        named = config.model.name_or_path if config.model.name_or_path != ModelConfig().name_or_path else None
    else:
        tree = dict(config) if isinstance(config, Mapping) else read_config(str(config))
        if datasets and not any(tree.get(key) for key in ("tasks", "sequence")):
            tree["tasks"] = list(datasets)
        parsed, section = finish_config(tree), tree.get("model")
        named = section.get("name_or_path") if isinstance(section, Mapping) else None
    if given is None:
        return parsed
    if named and not recorded:
        raise ConfigError(
            f"the configuration names the model '{named}', and a model object is given",
            "leave one of them out",
        )
    return dataclasses.replace(parsed, model=given.describe(parsed.model))
