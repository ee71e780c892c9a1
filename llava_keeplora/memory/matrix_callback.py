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
from llava_keeplora.distributed import is_main_process
from llava_keeplora.errors import ConfigError, RunError, nearest
from llava_keeplora.files import writable_folder
from llava_keeplora.report import Trial, write_report
from llava_keeplora.report.run_matrix import RunMatrix
from llava_keeplora.run_folder import MATRIX
from llava_keeplora_eval import Matrix

logger = logging.getLogger(__name__)

#: `score(model)` returns a model's score on a task in percent, for instance its accuracy.
Score = Callable[[nn.Module], float]


class MatrixCallback(TrainerCallback):
    """Score every task before the first training and after each one, and write the report.

    One callback belongs to the training of one task. The folder keeps the matrix: callbacks of later tasks,
    in the same program or another, go on with it. It gets `report.html`, the tables and the heat maps of all
    labels that it holds.

    Args:
        folder: the folder, created when missing.
        scores: task → `score(model)`, in the order in which the tasks are learned; called in evaluation mode
            without gradients, in every process.
        after: the task that the training learns.
        label: the method's name in the report.

    Raises:
        ConfigError: for a task that has no score, or a label that is no name of a folder.
        RunError: if the folder's matrix is of other tasks.
    """

    def __init__(self, folder: str | Path, scores: Mapping[str, Score], after: str, label: str = "keeplora"):
        if after not in scores:
            raise ConfigError(f"there is no score of the task '{after}'", nearest(after, scores))
        if not label or Path(label).name != label:
            raise ConfigError(f"the label '{label}' is no name of a folder", "use letters, digits and dashes")
        self.folder, self.scores, self.after, self.label = Path(folder), dict(scores), after, label
        self._read()  # Refuses a matrix of other tasks before the training.

    @property
    def matrix(self) -> Matrix:
        """The scores so far, in percent."""
        return self._read()

    def _read(self) -> Matrix:
        path = self.folder / self.label / MATRIX
        matrix = Matrix.from_json(path) if path.exists() else Matrix(list(self.scores))
        if matrix.tasks != list(self.scores):
            raise RunError(
                f"{path} is of the tasks {', '.join(matrix.tasks)}, and the scores are of "
                f"{', '.join(self.scores)}",
                "give the same scores in the same order, or another folder",
            )
        return matrix

    @property
    def matrices(self) -> RunMatrix:
        """The scores of all labels of the folder; a notebook shows them as tables."""
        paths = sorted(self.folder.glob(f"*/{MATRIX}"))
        return RunMatrix({path.parent.name: Matrix.from_json(path) for path in paths})

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Score the model before the first training; a row that is there already is kept."""
        matrix = self.matrix
        if matrix.zero_shot is not None or matrix.started:
            return
        if state.global_step:
            logger.warning(
                "the training goes on from step %d, so that the untouched model can't be scored any more",
                state.global_step,
            )
            return
        self._score(matrix, None, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Score the model after the training, and write the report."""
        self._score(self.matrix, self.after, model)
        if is_main_process():
            results = {label: [Trial(matrix)] for label, matrix in self.matrices.items()}
            write_report(self.folder, self.folder.resolve().name, results)

    def _score(self, matrix: Matrix, after: str | None, model: nn.Module) -> None:
        with evaluating(model), torch.no_grad():
            for task, score in self.scores.items():
                matrix.set_cell(after, task, score(model))
        if is_main_process():
            writable_folder(self.folder / self.label)
            matrix.to_json(self.folder / self.label / MATRIX)
