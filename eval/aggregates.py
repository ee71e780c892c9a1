"""Metrics of continual learning, computed from an accuracy matrix.

Legend: ``A[t][i]`` is the score in percent on task i after training task t, both 0-based and in the
run's order, T tasks. Every function takes the T x T cells (``None`` = not measured yet) and

* raises ``EvalError`` when a cell that its formula reads has not been measured;
* returns ``None`` where the definition itself has no value (Transfer or BWT of a single task).

Sums use ``math.fsum`` and nothing is rounded, so that rounding happens once, when a number is printed.

Sources: MTIL (Zheng et al. 2023, "Preventing Zero-Shot Transfer Degradation in Continual Learning of
Vision-Language Models", section 5.1) for Transfer, Average and Last; Lopez-Paz & Ranzato 2017 for BWT;
Chaudhry et al. 2018 ("Riemannian Walk for Incremental Learning") for forgetting; MCITlib (Guo et al.
2025) for MFT, MFN, MAA and BWT over T-1; CoIN (Chen et al. 2024) for BWT over T.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from llava_keeplora_eval.errors import EvalError

Cells = Sequence[Sequence[float | None]]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _read(cells: Cells, after: int, task: int) -> float:
    value = cells[after][task]
    if value is None:
        raise EvalError(
            f"the matrix has no score for task {task + 1} after task {after + 1}, which this number needs",
            "finish the run (start it again with the same command) before asking for it",
        )
    return value


def transfer_of(cells: Cells, task: int) -> float | None:
    """Return Transfer_i = mean over j < i of A[j][i], the score on a task before it is learned (MTIL).

    ``None`` for the first task, which has no row before it.
    """
    return _mean(_read(cells, j, task) for j in range(task)) if task > 0 else None


def average_of(cells: Cells, task: int) -> float:
    """Return Average_i = mean over all t of A[t][i]; the zero-shot row doesn't count (MTIL)."""
    return _mean(_read(cells, t, task) for t in range(len(cells)))


def last_of(cells: Cells, task: int) -> float:
    """Return Last_i = A[T-1][i], the score on task i at the end of the run (MTIL)."""
    return _read(cells, len(cells) - 1, task)


def transfer(cells: Cells) -> float | None:
    """Return Transfer = mean over i >= 1 of Transfer_i, a mean of per-task means, not of all cells (MTIL).

    ``None`` for a single task.
    """
    if len(cells) < 2:
        return None
    return _mean(transfer_of(cells, i) for i in range(1, len(cells)))


def average(cells: Cells) -> float:
    """Return Average = mean over i of Average_i, which equals the mean of all T x T cells (MTIL)."""
    return _mean(average_of(cells, i) for i in range(len(cells)))


def last(cells: Cells) -> float:
    """Return Last = mean over i of A[T-1][i] (MTIL); it equals MFN."""
    return _mean(last_of(cells, i) for i in range(len(cells)))


def _changes(cells: Cells) -> list[float]:
    """Return A[T-1][i] - A[i][i] for every task but the last."""
    end = len(cells) - 1
    return [_read(cells, end, i) - _read(cells, i, i) for i in range(end)]


def bwt(cells: Cells) -> float | None:
    """Return BWT = 1/(T-1) * sum over i < T-1 of (A[T-1][i] - A[i][i]) (Lopez-Paz & Ranzato; MCITlib).

    Negative means forgetting. ``None`` for a single task.
    """
    return _mean(_changes(cells)) if len(cells) > 1 else None


def bwt_coin(cells: Cells) -> float:
    """Return BWT with CoIN's divisor: 1/T * sum over i of (A[T-1][i] - A[i][i]); the last term is 0.

    It is (T-1)/T times ``bwt``; 0 for a single task.
    """
    return math.fsum(_changes(cells)) / len(cells)


def forgetting(cells: Cells) -> float | None:
    """Return the final drop from the diagonal, mean over i < T-1 of (A[i][i] - A[T-1][i]); this is ``-bwt``.

    ``None`` for a single task.
    """
    return _mean(-change for change in _changes(cells)) if len(cells) > 1 else None


def forgetting_max(cells: Cells) -> float | None:
    """Return the drop from the best earlier score: mean over i < T-1 of (max_{l < T-1} A[l][i] - A[T-1][i]).

    Chaudhry et al. 2018, equations 2 and 3: the maximum is over all earlier rows, including those before
    task i was learned, so it reads the upper triangle; it is never smaller than ``forgetting``. ``None`` for
    a single task.
    """
    end = len(cells) - 1
    if end < 1:
        return None
    return _mean(max(_read(cells, row, i) for row in range(end)) - _read(cells, end, i) for i in range(end))


def mft(cells: Cells) -> float:
    """Return MFT = mean over i of A[i][i], each task right after it was learned (MCITlib)."""
    return _mean(_read(cells, i, i) for i in range(len(cells)))


def mfn(cells: Cells) -> float:
    """Return MFN = mean over i of A[T-1][i], every task at the end (MCITlib)."""
    return last(cells)


def maa(cells: Cells) -> float:
    """Return MAA = mean over t of (mean over i <= t of A[t][i]), the tasks seen so far (MCITlib)."""
    return _mean(_mean(_read(cells, t, i) for i in range(t + 1)) for t in range(len(cells)))


#: Every aggregate by the name that reports and ``Matrix.metrics`` use, in display order.
AGGREGATES = {
    "transfer": transfer,
    "average": average,
    "last": last,
    "forgetting": forgetting,
    "forgetting_max": forgetting_max,
    "bwt": bwt,
    "bwt_coin": bwt_coin,
    "mft": mft,
    "mfn": mfn,
    "maa": maa,
}
