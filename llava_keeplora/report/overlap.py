"""Overlap of the tasks' input subspaces.

Legend: in features of a layer, r rank, A (r, in) of a delta scale · B A; the rows of A span the task's input
subspace, the directions of its input that the update reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_keeplora.files import open_tensors
from llava_keeplora.report.figures import Palette
from llava_keeplora.report.heatmap import draw_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = ".A"


def overlap(paths: Sequence[Path]) -> list[list[float | None]] | None:
    """Return the mean over the layers of ‖Q_iᵀ Q_j‖²_F / min(r_i, r_j) for all pairs of tasks i, j.

    Q (in, r) is an orthonormal basis of the rows of a task's A. The number is the mean squared cosine of the
    principal angles between two tasks' input subspaces: 1 where one contains the other, 0 where they are
    orthogonal. Only layers on which both tasks have an adapter count.

    Args:
        paths: each task's `delta.safetensors`, in order; missing files are tasks without adapters.

    Returns:
        a matrix (T, T), None in cells without a common layer; None where fewer than two tasks have an
        adapter, as of a bound with one update for all tasks.
    """
    files = {task: open_tensors(path) for task, path in enumerate(paths) if path.exists()}
    keys = {task: {key for key in file.keys() if key.endswith(KEY)} for task, file in files.items()}
    if sum(map(bool, keys.values())) < 2:
        return None
    sums, counts = torch.zeros(len(paths), len(paths)), torch.zeros(len(paths), len(paths))
    for key in sorted({key for names in keys.values() for key in names}):
        bases = _bases({task: file.get_tensor(key) for task, file in files.items() if key in keys[task]})
        tasks, ranks = torch.tensor(list(bases)), torch.tensor([basis.shape[1] for basis in bases.values()])
        # All pairs of tasks in one product; its squares are summed over each pair's block.
        joined = torch.cat(list(bases.values()), dim=1)
        squares = (joined.T @ joined).square()
        owner = torch.repeat_interleave(torch.arange(len(ranks)), ranks)
        blocks = torch.zeros(len(ranks), len(squares)).index_add_(0, owner, squares)
        blocks = torch.zeros(len(ranks), len(ranks)).index_add_(1, owner, blocks)
        sums[tasks[:, None], tasks] += blocks / torch.minimum(ranks[:, None], ranks)
        counts[tasks[:, None], tasks] += 1
    return [
        [float(total / count) if count else None for total, count in zip(*rows)] for rows in zip(sums, counts)
    ]


def _bases(rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return an orthonormal basis (in, r) of the rows of each A (r, in), computed per shape in one batch."""
    shapes = {tuple(A.shape) for A in rows.values()}
    alike = [[task for task, A in rows.items() if tuple(A.shape) == shape] for shape in sorted(shapes)]
    bases: dict[int, Tensor] = {}
    for tasks in alike:
        bases |= zip(tasks, torch.linalg.qr(torch.stack([rows[task].float().T for task in tasks])).Q)
    return {task: bases[task] for task in rows}


def draw_overlap(
    tasks: Sequence[str], cells: Sequence[Sequence[float | None]], title: str, palette: Palette
) -> Figure:
    """Draw the overlaps as a heat map from 0 to 1."""
    figure, axes = draw_cells(
        tasks, list(enumerate(cells)), title, "mean squared cosine", (0.0, 1.0), palette, precision=2
    )
    axes.set_yticks([y + 0.5 for y in range(len(tasks))], tasks)
    axes.set_xlabel("input subspace of this task's update", color=palette.ink)
    axes.set_ylabel("and of this one's", color=palette.ink)
    return figure
