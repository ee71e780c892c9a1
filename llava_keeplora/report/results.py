"""Results of one run of one method, and the means over several with different seeds."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_keeplora_eval import Matrix
from llava_keeplora_eval.matrix import format_number

#: One mapping per stage (0 = weight basis only, then after each task): layer name -> in, k, part.
CapacityStages = Sequence[Mapping[str, Mapping]]
#: part of the model -> layer name -> one number per stage or task, NaN where it is missing.
LayerLines = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Cost:
    """Time and memory of one kind of stage, over all tasks.

    Args:
        seconds: the sum over the tasks.
        peak_bytes: the highest peak of memory among the tasks; None where it wasn't measured.
        peak_of: which memory was measured (a GPU's, or the process's), as recorded in the journal.
    """

    seconds: float
    peak_bytes: int | None = None
    peak_of: str = ""


@dataclass(frozen=True)
class Needs:
    """Resources of a method, means over the finished tasks; None where no task is finished.

    Args:
        trained: number of parameters that a training trains, of one task or of several at once.
        kept_bytes: bytes of the files that later tasks or the final model need, kept examples included, over
            the number of tasks learned.
        test_seconds: extra time to answer an example, compared with the base model.
        examples: number of examples that all training steps saw, each as often as it was seen.
        training_passes: the same per training example of the tasks.
        other_passes: kind (`gradient`, `feature`, `forward`, `answer`, `reference`) → examples that went
            through the model besides, per training example of the tasks.
        inputs: what it needs beyond the task's own data; None before its last task is closed.
        further: whether a step learns from more than its batch, from the model's own answers for instance.
    """

    trained: float | None
    kept_bytes: float | None
    test_seconds: float | None
    examples: int | None = None
    training_passes: float | None = None
    other_passes: Mapping[str, float] | None = None
    inputs: tuple[str, ...] | None = None
    further: bool = False


@dataclass(frozen=True)
class Trial:
    """One run of one method: its matrix and, where its folder has them, the other results.

    Args:
        matrix: its scores.
        seed: the run's seed.
        run: the run's name.
        folder: the method's folder; None where there is none.
        capacity: protected directions per stage.
        captured: per task, the share of each layer's residual gradient energy that its adapter's directions
            contain.
        overlap: mean squared cosines (T, T) between the tasks' input subspaces; None with fewer than two.
        losses: task -> (optimiser step, training loss).
        costs: stage -> its cost, in the order of the stages.
        needs: the resources that the method took; None where it learns nothing.
        scores: one mapping per stage, the base's first: task -> score as
            `llava_keeplora_eval.scoring.Score.to_dict` gives it.
        rolled_back: names of the tasks that the guard took back.
        watched: stage (`zero-shot`, then each task) → recipe that the guard watches → score in percent.
        marks: task → what a table says of the row after it: that it was rolled back, or stopped the method.
    """

    matrix: Matrix
    seed: int | None = None
    run: str = ""
    folder: Path | None = None
    capacity: CapacityStages = ()
    captured: LayerLines = field(default_factory=dict)
    overlap: Sequence[Sequence[float | None]] | None = None
    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    scores: Sequence[Mapping[str, Mapping]] = ()
    needs: Needs | None = None
    rolled_back: Sequence[str] = ()
    watched: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def learned(self) -> list[str]:
        """Names of the tasks that the method learned and kept, in order."""
        return [task for task in self.matrix.tasks if task not in self.rolled_back]


#: Name (a method, a method of one of several runs) -> its trials, one per seed.
Results = Mapping[str, Sequence[Trial]]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; None where a value is missing, so that a mean always covers all trials."""
    values = list(values)
    return None if not values or None in values else math.fsum(values) / len(values)


def deviation(values: Iterable[float | None]) -> float | None:
    """Return the sample standard deviation (n - 1); None for fewer than two values or a missing one."""
    values = list(values)
    return None if len(values) < 2 or None in values else statistics.stdev(values)


def spread(values: Sequence[float | None], precision: int = 1) -> str:
    """Format `mean ± sd` for a table; the mean alone where the deviation is None or 0."""
    sd = deviation(values)
    return format_number(mean(values), precision) + (f" ± {sd:.{precision}f}" if sd else "")


def mean_cells(tables: Sequence[Sequence[Sequence[float | None]]]) -> list[list[float | None]]:
    """Return cell-wise means of tables of one shape."""
    return [[mean(cells) for cells in zip(*rows)] for rows in zip(*tables)]


def mean_matrix(matrices: Sequence[Matrix]) -> Matrix:
    """Return cell-wise means; a cell that one of the matrices lacks is missing."""
    if len(matrices) == 1:
        return matrices[0]
    has_zero_shot = all(matrix.zero_shot is not None for matrix in matrices)
    zero_shot = mean_cells([[matrix.zero_shot] for matrix in matrices])[0] if has_zero_shot else None
    rows = mean_cells([matrix.rows for matrix in matrices])
    return Matrix(matrices[0].tasks, zero_shot, rows, all(matrix.of_bound for matrix in matrices))


def row_marks(trials: Sequence[Trial]) -> dict[str, str]:
    """Return task → what a table says of the row after it; of several seeds, with how many it is of."""
    counts = Counter((task, mark) for trial in trials for task, mark in trial.marks.items())
    marks: dict[str, list[str]] = {}
    for (task, mark), count in counts.items():
        marks.setdefault(task, []).append(mark + f" in {count} of {len(trials)}" * (count < len(trials)))
    return {task: ", ".join(words) for task, words in marks.items()}


def is_bound(matrices: Sequence[Matrix]) -> bool:
    """Return whether trials are of a bound; see `Matrix.bound`."""
    return all(matrix.bound for matrix in matrices)


def mean_lines(lines: Sequence[LayerLines]) -> LayerLines:
    """Return the means over trials, of the layers and stages that all of them have."""
    first, *others = lines
    return {
        part: {
            name: [
                math.fsum(values) / len(lines)
                for values in zip(line, *(other[part][name] for other in others))
            ]
            for name, line in layers.items()
            if all(name in other.get(part, {}) for other in others)
        }
        for part, layers in first.items()
    }


def mean_scores(trials: Sequence[Trial]) -> list[dict[str, dict]]:
    """Return the scores per stage and task, their percentages averaged over the trials."""
    return [
        {
            task: {
                **score,
                **{
                    key: mean(stage[task][key] for stage in stages)
                    for key in ("score", "lenient", "compliance")
                },
            }
            for task, score in stages[0].items()
            if all(task in stage for stage in stages)
        }
        for stages in zip(*(trial.scores for trial in trials))
    ]


def matrices(results: Results) -> dict[str, list[Matrix]]:
    """Return name -> the trials' matrices."""
    return {name: [trial.matrix for trial in trials] for name, trials in results.items()}
