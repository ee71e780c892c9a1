"""The accuracy matrix of a task sequence that is trained by anyone's `transformers.Trainer`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from llava_keeplora.capture import evaluating
from llava_keeplora.config.guard import GuardConfig
from llava_keeplora.distributed import is_main_process
from llava_keeplora.errors import ConfigError, RunError, nearest
from llava_keeplora.files import writable_folder, write_json
from llava_keeplora.guard import run_record
from llava_keeplora.guard.verdicts import read_marks
from llava_keeplora.memory.training_guard import (
    AFTER,
    BEFORE,
    NOISE,
    MakePredictor,
    RecipeAnswers,
    TrainingGuard,
    load_recipes,
    stop_if_broken,
)
from llava_keeplora.report import Trial, write_report
from llava_keeplora.report.run_matrix import RunMatrix
from llava_keeplora.report.verdict import verdict_html
from llava_keeplora.run_folder import GUARD, MATRIX, read_record, task_folder
from llava_keeplora_eval import Matrix

logger = logging.getLogger(__name__)

#: `score(model)` returns a model's score on a task in percent, for instance its accuracy.
Score = Callable[[nn.Module], float]


class MatrixCallback(TrainerCallback):
    """Score every task before the first training and after each one, judge it, and write the report.

    One callback belongs to the training of one task. The folder keeps the matrix: callbacks of later tasks,
    in the same program or another, go on with it. It gets `report.html`, the tables and the heat maps of all
    labels that it holds.

    Args:
        folder: the folder, created when missing.
        scores: task → `score(model)`, in the order in which the tasks are learned; called in evaluation mode
            without gradients, in every process. Or task → a recipe, by name or file, whose split `test`
            `predictor` answers and its metric scores.
        after: the task that the training learns.
        label: the method's name in the report.
        guard: the keys of `guard` in a run's configuration (docs/guard.md), to judge the training by: what it
            watches, and the limits. Limits of tasks need a recipe as the task's score. After a broken limit,
            `on_failure: stop`, the default, raises GuardError from `trainer.train()`, and `warn` goes on.
        predictor: `predictor(model, recipe)` returns what answers a recipe's examples with the model, for
            instance a `ClipPredictor` or a `LlavaPredictor`.
        batch_size: examples per call of the predictor.
        data_root: the folder that relative paths of recipes start from.

    Raises:
        ConfigError: for a task that has no score, a label that is no name of a folder, or a guard that can't
            be evaluated.
        RunError: if the folder's matrix is of other tasks.
    """

    def __init__(
        self,
        folder: str | Path,
        scores: Mapping[str, Score | str],
        after: str,
        label: str = "keeplora",
        guard: GuardConfig | Mapping[str, Any] | None = None,
        predictor: MakePredictor | None = None,
        batch_size: int = 64,
        data_root: str | None = None,
    ):
        if after not in scores:
            raise ConfigError(f"there is no score of the task '{after}'", nearest(after, scores))
        if not label or Path(label).name != label:
            raise ConfigError(f"the label '{label}' is no name of a folder", "use letters, digits and dashes")
        self.folder, self.scores, self.after, self.label = Path(folder), dict(scores), after, label
        self._data = load_recipes(scores, data_root)
        if predictor is None and (guard is not None or self._data):
            raise ConfigError(
                f"{'a recipe' if guard is None else 'a guard'} needs something that answers with the model",
                "give `predictor`, a function of the model and a recipe",
            )
        place = self.folder / label / task_folder(list(scores).index(after) + 1, after)
        self._answers = RecipeAnswers(place, predictor, batch_size)
        tasks = {task: self._data.get(task) for task in scores}
        self._guard = None if guard is None else TrainingGuard(guard, tasks, after, self._answers, data_root)
        self._read()  # Refuses a matrix of other tasks before the training.

    @property
    def matrix(self) -> Matrix:
        """The scores so far, in percent."""
        return self._read()

    def _read(self) -> Matrix:
        for path in sorted(self.folder.glob(f"*/{MATRIX}")):  # One report has those of all labels.
            if (tasks := Matrix.from_json(path).tasks) != list(self.scores):
                raise RunError(
                    f"{path} is of the tasks {', '.join(tasks)}, and the scores are of "
                    f"{', '.join(self.scores)}",
                    "give the same scores in the same order, or another folder",
                )
        path = self.folder / self.label / MATRIX
        return Matrix.from_json(path) if path.exists() else Matrix(list(self.scores))

    @property
    def verdict(self) -> dict[str, Any] | None:
        """The guard's verdict on the training; None before its end, and without a guard."""
        path = self._answers.folder / GUARD
        return read_record(path) if self._guard and path.exists() else None

    @property
    def matrices(self) -> RunMatrix:
        """The scores of all labels of the folder; a notebook shows them as tables."""
        paths = sorted(self.folder.glob(f"*/{MATRIX}"))
        return RunMatrix.of(self.folder, {path.parent.name: Matrix.from_json(path) for path in paths})

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Score the model before the first training; a row that is there already is kept.

        A guard answers its recipes with the model before every training.

        Raises:
            RunError: the training goes on from a checkpoint, and the guard has no answers from before it.
        """
        matrix = self.matrix
        first = matrix.zero_shot is None and not matrix.started
        if state.global_step:
            if self._guard:
                self._guard.check_begun(self._learned(matrix))
            if first:
                logger.warning(
                    "the training goes on from step %d, so that the untouched model can't be scored any more",
                    state.global_step,
                )
            return
        self._answers.remove(BEFORE, NOISE)
        if self._guard:
            with evaluating(model), torch.no_grad():
                self._guard.begin(model, self._learned(matrix))
        if first:
            self._score(matrix, None, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Score the model after the training, judge it, and write the report.

        Raises:
            GuardError: a limit is broken, and the guard stops then.
        """
        matrix, verdict = self.matrix, None
        self._answers.remove(AFTER)
        if self._guard:
            with evaluating(model), torch.no_grad():
                verdict = self._guard.judge(model, self._learned(matrix))
        self._score(matrix, self.after, model)
        if is_main_process():
            self._write_report()
        if verdict:
            stop_if_broken(verdict)

    def _learned(self, matrix: Matrix) -> list[str]:
        """Return the tasks that earlier trainings learned, without those that the guard stopped."""
        scored = (any(cell is not None for cell in row) for row in matrix.rows)
        gone = [self.after, *read_marks(self.folder / self.label, matrix.tasks)]
        return [task for task, done in zip(matrix.tasks, scored, strict=True) if done and task not in gone]

    def _write_report(self) -> None:
        tasks, matrices = list(self.scores), self.matrices
        verdicts = run_record(self.folder, list(matrices), tasks)
        if verdicts["methods"]:
            write_json(self.folder / GUARD, verdicts)
        else:  # The last one was of a training that this one without a guard has replaced.
            (self.folder / GUARD).unlink(missing_ok=True)
        results = {
            label: [Trial(matrix, watched=matrices.watched[label], marks=matrices.marks[label])]
            for label, matrix in matrices.items()
        }
        head = verdict_html(self.folder)
        write_report(self.folder, self.folder.resolve().name, results, head=head)

    def _score(self, matrix: Matrix, after: str | None, model: nn.Module) -> None:
        with evaluating(model), torch.no_grad():
            for task, score in self.scores.items():
                when = BEFORE if after is None else AFTER
                value = (
                    self._answers.score(model, self._data[task], when)
                    if isinstance(score, str)
                    else score(model)
                )
                matrix.set_cell(after, task, value)
        if is_main_process():
            writable_folder(self.folder / self.label)
            matrix.to_json(self.folder / self.label / MATRIX)
