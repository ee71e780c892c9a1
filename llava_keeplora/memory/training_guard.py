"""The guard around one training in anyone's trainer: answers before and after it, and the verdict."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_keeplora.coerce import build
from llava_keeplora.config.guard import GuardConfig
from llava_keeplora.distributed import all_gather_object, is_main_process
from llava_keeplora.errors import ConfigError, GuardError, RunError, UserError
from llava_keeplora.files import write_json
from llava_keeplora.guard import NEW, OLD, WATCH, Limit, headline, judge, verdict_lines
from llava_keeplora.guard.answering import answer, model_dtype
from llava_keeplora.guard.noise import noise_examples, noise_record, variants
from llava_keeplora.guard.watch import check_names, load_watch
from llava_keeplora.run_folder import GUARD, STOP, THEN, WARN, file_name
from llava_keeplora_eval.paired_scores import check_comparable
from llava_keeplora_eval.predictions import read_predictions
from llava_keeplora_eval.predictors import Predictor
from llava_keeplora_eval.scoring import score
from llava_keeplora_recipes import Recipe, TaskData, load_recipe

log = logging.getLogger(__name__)

#: `predictor(model, recipe)` returns what answers a recipe's examples with the model as it is then.
MakePredictor = Callable[[nn.Module, Recipe], Predictor]
#: Folders of answers: of the model before the training, after it, and before it with other batches.
BEFORE, AFTER, NOISE = "before", "after", "noise"


class RecipeAnswers:
    """Answers of the model of one training to recipes, in files.

    Args:
        folder: the training's folder.
        predictor: makes what answers.
        batch_size: examples per forward pass.
    """

    def __init__(self, folder: Path, predictor: MakePredictor | None, batch_size: int):
        self.folder, self.predictor, self.batch_size = folder, predictor, batch_size

    def remove(self, *when: str) -> None:
        """Remove answers of another model, and the verdict; every process must call this."""
        if is_main_process():
            (self.folder / GUARD).unlink(missing_ok=True)
            for name in when:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        all_gather_object(None)

    def of(self, model: nn.Module, data: TaskData, when: str) -> dict[str, str]:
        """Return id → answer; answers that are there already are kept."""
        return self._answer(model, data, self._path(data, when), self.batch_size)

    def make_noise(self, model: nn.Module, data: TaskData) -> None:
        """Answer again with other batches and in another precision, for `noise`."""
        few = noise_examples(data)
        for variant in variants(self.batch_size, model_dtype(model)):
            path = self._path(data, NOISE, f".{variant.name}")
            self._answer(model, few, path, variant.batch_size, variant.dtype)

    def _answer(
        self, model: nn.Module, data: TaskData, path: Path, batch_size: int, dtype: torch.dtype | None = None
    ) -> dict[str, str]:
        assert self.predictor is not None, "checked with the recipes"
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return answer(self.predictor(model, data.recipe), data, path, batch_size, device, dtype=dtype)

    def score(self, model: nn.Module, data: TaskData, when: str) -> float:
        """Return the score of the answers, in percent."""
        self.of(model, data, when)
        return score(data, self._path(data, when)).score

    def noise(self, data: TaskData) -> float:
        """Return the noise in points, from the answers as recorded earlier; see `recorded`."""
        record = noise_record(noise_examples(data), self.recorded(data, BEFORE), self.recorded_noise(data))
        return float(record["points"])

    def recorded_noise(self, data: TaskData) -> dict[str, dict[str, str]]:
        """Return name of a variant → id → answer as recorded earlier; see `recorded`."""
        few, names = noise_examples(data), [v.name for v in variants(self.batch_size, torch.float32)]
        return {name: self.recorded(few, NOISE, f".{name}") for name in names}

    def recorded(self, data: TaskData, when: str, variant: str = "") -> dict[str, str]:
        """Return id → answer as recorded earlier.

        Raises:
            RunError: some are missing.
        """
        answers = read_predictions(self._path(data, when, variant), data)
        if len(answers) < len(data):
            raise RunError(
                f"the guard has {len(answers)} of {len(data)} answers to {data.recipe.name} from before the "
                "training, which goes on from a checkpoint",
                f"begin the training anew, or give back the folder {self.folder}",
            )
        return answers

    def _path(self, data: TaskData, when: str, variant: str = "") -> Path:
        return self.folder / when / f"{file_name(data.recipe.name)}{variant}.jsonl"


def load_recipes(scores: Mapping[str, Any], data_root: str | None) -> dict[str, TaskData]:
    """Return task → test examples of those scores that are recipes, by name or file."""
    names = {task: name for task, name in scores.items() if isinstance(name, str)}
    return {task: load_watch(load_recipe(name), None, data_root) for task, name in names.items()}


class TrainingGuard:
    """The guard of one training.

    Args:
        settings: keys of a configuration's `guard`.
        tasks: the tasks in order → their examples; None of a task whose score is a function.
        after: the task that the training learns.
        answers: where answers are kept.
        data_root: the folder that relative paths of recipes start from.

    Raises:
        ConfigError: the guard can't be evaluated.
    """

    def __init__(
        self,
        settings: GuardConfig | Mapping[str, Any],
        tasks: Mapping[str, TaskData | None],
        after: str,
        answers: RecipeAnswers,
        data_root: str | None,
    ):
        self.settings = (
            settings if isinstance(settings, GuardConfig) else build(GuardConfig, settings, "guard")
        )
        self.tasks, self.after, self.answers = _with_examples(tasks, after, self.settings), after, answers
        if self.settings.on_failure not in (STOP, WARN):
            raise ConfigError(
                f"on_failure is {self.settings.on_failure}, and a callback does not hold the model's weights",
                "choose stop, and take the task back with `KeepLora.cancel_task`; or warn",
            )
        try:
            watch = [(load_recipe(entry.task), entry.examples) for entry in self.settings.watch]
            self.watched = [load_watch(recipe, examples, data_root) for recipe, examples in watch]
            for data in (*self.watched, *(self.tasks.values() if self.settings.judges_tasks else ())):
                check_comparable(data)
        except UserError as error:
            raise ConfigError(f"the guard can't be evaluated: {error.problem}", error.cure) from error
        check_names(
            [data.recipe.name for data in self.watched], [data.recipe.name for data in self.tasks.values()]
        )

    def begin(self, model: nn.Module, learned: Sequence[str]) -> None:
        """Answer with the model before the training, and measure its noise.

        Args:
            model: the model.
            learned: tasks that earlier trainings learned.
        """
        for _, data, _ in self._judged(learned):
            self.answers.of(model, data, BEFORE)
            self.answers.make_noise(model, data)

    def check_begun(self, learned: Sequence[str]) -> None:
        """Check that a training that goes on from a checkpoint has its answers from before.

        Raises:
            RunError: some are missing.
        """
        for _, data, _ in self._judged(learned):
            self.answers.recorded(data, BEFORE)
            self.answers.recorded_noise(data)

    def judge(self, model: nn.Module, learned: Sequence[str]) -> dict[str, Any]:
        """Answer with the model after the training, and return and write the verdict."""
        limits = []
        for of, data, least in self._judged(learned):
            before = self.answers.recorded(data, BEFORE)
            after, noise = self.answers.of(model, data, AFTER), self.answers.noise(data)
            limits.append(Limit(of, data, before, after, least, noise))
        verdict = judge(self.after, limits, self.settings.confidence)
        verdict |= {THEN: None if verdict["ship"] else self.settings.on_failure}
        if is_main_process():
            write_json(self.answers.folder / GUARD, verdict)
            log.log(logging.INFO if verdict["ship"] else logging.WARNING, "\n".join(verdict_lines(verdict)))
        all_gather_object(None)  # Every process may read the verdict's file.
        return verdict

    def _judged(self, learned: Sequence[str]) -> Iterator[tuple[str, TaskData, float]]:
        """Yield what each limit is of, its examples, and the least accepted change."""
        settings = self.settings
        if (gain := settings.new_task.min_gain) is not None:
            yield NEW, self.tasks[self.after], gain
        if (least := settings.old_tasks.least) is not None:
            for task in learned:
                yield OLD, self.tasks[task], least
        if (least := settings.watch_tasks.least) is not None:
            for data in self.watched:
                yield WATCH, data, least


def _with_examples(
    tasks: Mapping[str, TaskData | None], after: str, settings: GuardConfig
) -> dict[str, TaskData]:
    """Return the tasks that have examples.

    Raises:
        ConfigError: one of the others has a limit.
    """
    limited = list(tasks) if settings.old_tasks.max_drop is not None else []
    limited += [after] if settings.new_task.min_gain is not None else []
    if lacking := [task for task in limited if tasks[task] is None]:
        raise ConfigError(
            f"the guard has a limit for '{lacking[0]}', whose score is a function, and a limit needs the "
            "answers to its examples",
            "give the task's recipe as its score, by name or file",
        )
    return {task: data for task, data in tasks.items() if data is not None}


def stop_if_broken(verdict: Mapping[str, Any]) -> None:
    """Raise GuardError after a verdict that says to stop."""
    if verdict[THEN] == STOP:
        raise GuardError(
            f"the guard stops here: {headline(verdict)}",
            "take the task back (`KeepLora.cancel_task`), or set on_failure to warn",
        )
