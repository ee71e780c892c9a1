"""Results of one run of one method, and the means over several with different seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llava_keeplora_eval import Matrix
from llava_keeplora_eval.matrix import shown

#: One mapping per stage (0 = weight basis only, then after each task): layer name -> in, k, part.
CapacityStages = Sequence[Mapping[str, Mapping]]
#: part of the model -> layer name -> one number per stage or task, nan where there is none.
LayerLines = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Cost:
    """Time and memory of one kind of stage, over all tasks.

    Args:
        seconds: the sum over the tasks.
        peak_bytes: the highest peak of memory among them; None where it wasn't measured.
        peak_of: what it is the peak of, as the journal says.
    """

    seconds: float
    peak_bytes: int | None = None
    peak_of: str = ""


@dataclass(frozen=True)
class Needs:
    """Requirements of a method, means over the finished tasks; None where no task is finished.

    Args:
        trained: parameters that a task trains.
        kept_bytes: of a task's files that later tasks and the final model are made of.
        test_seconds: extra time to answer an example, compared with the untouched model.
    """

    trained: float | None
    kept_bytes: float | None
    test_seconds: float | None


@dataclass(frozen=True)
class Trial:
    """One run of one method: its matrix and, where its folder has them, the other results.

    Args:
        matrix: its scores.
        seed: of the run.
        run: its name.
        capacity: protected directions per stage.
        captured: per task, the share of each layer's residual gradient energy that its adapter's directions
            hold.
        overlap: T x T mean squared cosines between the tasks' input subspaces; None where there aren't two.
        losses: task -> (optimiser step, training loss).
        costs: stage -> what it took, in the order of the stages.
        needs: what the method asked for; None where it learns nothing.
        scores: one mapping per stage, the base's first: task -> score as
            `llava_keeplora_eval.scoring.Score.to_dict` gives it.
    """

    matrix: Matrix
    seed: int | None = None
    run: str = ""
    capacity: CapacityStages = ()
    captured: LayerLines = field(default_factory=dict)
    overlap: Sequence[Sequence[float | None]] | None = None
    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    scores: Sequence[Mapping[str, Mapping]] = ()
    needs: Needs | None = None


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
    around = deviation(values)
    return shown(mean(values), precision) + (f" ± {around:.{precision}f}" if around else "")


def mean_cells(tables: Sequence[Sequence[Sequence[float | None]]]) -> list[list[float | None]]:
    """Return cell-wise means of tables of one shape."""
    return [[mean(cells) for cells in zip(*rows)] for rows in zip(*tables)]


def mean_matrix(matrices: Sequence[Matrix]) -> Matrix:
    """Return cell-wise means; a cell that one of the matrices lacks is missing."""
    if len(matrices) == 1:
        return matrices[0]
    known = all(matrix.zero_shot is not None for matrix in matrices)
    zero_shot = mean_cells([[matrix.zero_shot] for matrix in matrices])[0] if known else None
    return Matrix(matrices[0].tasks, zero_shot, mean_cells([matrix.rows for matrix in matrices]))


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
        }
        for stages in zip(*(trial.scores for trial in trials))
    ]


def matrices(results: Results) -> dict[str, list[Matrix]]:
    """Return name -> the trials' matrices."""
    return {name: [trial.matrix for trial in trials] for name, trials in results.items()}
