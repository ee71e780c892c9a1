"""Plots that compare methods, a line each: every task's score, its forgetting, and the training loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llava_keeplora.report.figures import (
    BOUND_LINE,
    Palette,
    bare,
    fill,
    legend_above,
    new_figure,
    style,
)
from llava_keeplora.report.heatmap import colour_limits
from llava_keeplora.report.results import Results, Trial, deviation, is_bound, mean
from llava_keeplora_eval import Matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 4  # side by side, one per task
PANEL = (2.6, 2.2)  # inches
#: (x, one value per trial) of one line, in order.
Points = Sequence[tuple[float, Sequence[float]]]


def draw_curves(results: Results, palette: Palette) -> Figure:
    """Plot every task's score over the stages, one panel per task.

    A dashed line marks the stage that learned the task; a model that never changes, and a bound, are level
    lines.
    """
    tasks = _tasks(results)

    def points(trials: Sequence[Trial], i: int) -> Points:
        matrices = [_level(trial.matrix) for trial in trials]
        rows = [[matrix.zero_shot or [None] * len(tasks), *matrix.rows] for matrix in matrices]
        return _measured((stage, [stages[stage][i] for stages in rows]) for stage in range(len(tasks) + 1))

    figure, panels = _per_task(results, points, "tasks learned", "score (%)", palette)
    low, high = colour_limits(trial.matrix for trials in results.values() for trial in trials)
    for position, axes in enumerate(panels, start=1):
        axes.axvline(position, color=palette.ink, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
        axes.set_xlim(-0.2, len(tasks) + 0.2)
        axes.set_xticks(range(0, len(tasks) + 1, max(1, len(tasks) // 6)))
        axes.set_ylim(low - 2, high + 2)
    return figure


def draw_losses(results: Results, palette: Palette) -> Figure | None:
    """Plot the training loss of every task over its optimiser steps; None where no step was logged."""
    tasks = _tasks(results)

    def points(trials: Sequence[Trial], i: int) -> Points:
        curves = [dict(trial.losses.get(tasks[i], ())) for trial in trials]
        return [
            (step, [curve[step] for curve in curves])
            for step in curves[0]
            if all(step in curve for curve in curves)
        ]

    logged = {name: trials for name, trials in results.items() if any(trial.losses for trial in trials)}
    if not logged:
        return None
    from matplotlib.ticker import MaxNLocator  # see figures.new_figure

    figure, panels = _per_task(results, points, "optimiser step", "training loss", palette)
    for axes in panels:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def draw_forgetting(results: Results, palette: Palette) -> Figure | None:
    """Plot the drop of each task's score since it was learned.

    The left panel has the mean over the earlier tasks after every task, the right one each task's drop by the
    last stage. Returns None before the second task is scored.
    """
    tasks, order = _tasks(results), list(results)
    drops = {name: [_drops(trial.matrix) for trial in trials] for name, trials in results.items()}
    means = {
        name: _measured((t + 1, [mean(rows[t][:t]) for rows in trials]) for t in range(1, len(tasks)))
        for name, trials in drops.items()
    }
    means = {name: points for name, points in means.items() if points}
    if not means:
        return None
    figure = new_figure((10.4, 1.6 + max(2.0, 0.3 * len(tasks))), palette)
    over, by = figure.subplots(1, 2)
    height = 0.8 / len(means)
    for row, (name, points) in enumerate(means.items()):
        draw_line(over, points, name, order.index(name))
        last = int(points[-1][0]) - 1
        ends = [[rows[last][i] for rows in drops[name]] for i in range(last)]
        spreads = [deviation(values) for values in ends] if len(drops[name]) > 1 else None
        centres = [i + (row - (len(means) - 1) / 2) * height for i in range(last)]
        by.barh(
            centres,
            [mean(values) for values in ends],
            height,
            xerr=spreads,
            ecolor=palette.ink,
            **fill(order.index(name), palette),
        )
    over.set(
        xlabel="tasks learned",
        ylabel="mean drop of the tasks before (points)",
        xticks=range(2, len(tasks) + 1),
    )
    by.set(xlabel="drop from just after learning to the last stage (points)")
    by.set_yticks(range(len(tasks) - 1), tasks[:-1])
    by.invert_yaxis()
    for axes, line in ((over, over.axhline), (by, by.axvline)):
        bare(axes, palette)
        line(0, color=palette.ink, linewidth=0.8)
    legend_above(figure, [over], palette)
    return figure


def _level(matrix: Matrix) -> Matrix:
    """Return the matrix of a model that never changes where the scores are the base's or a bound's."""
    if matrix.bound:
        return Matrix(matrix.tasks, matrix.rows[-1], [matrix.rows[-1]] * len(matrix.tasks))
    return matrix.or_constant()


def _tasks(results: Results) -> list[str]:
    return next(iter(results.values()))[0].matrix.tasks


def _drops(matrix: Matrix) -> list[list[float | None]]:
    """Return a matrix: row t, column i is the drop of task i since right after it was learned, after task t.

    Cells that are not measured are None.
    """
    start = [matrix.rows[i][i] for i in range(len(matrix.tasks))]
    return [
        [None if None in (now, then) else then - now for now, then in zip(row, start)] for row in matrix.rows
    ]


def _measured(points) -> Points:
    return [(x, values) for x, values in points if None not in values]


def _per_task(
    results: Results,
    points: Callable[[Sequence[Trial], int], Points],
    xlabel: str,
    ylabel: str,
    palette: Palette,
) -> tuple[Figure, list[Axes]]:
    """Draw a panel per task with a line per method, in the same colours in all of them."""
    tasks = _tasks(results)
    columns = min(PANELS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = new_figure((PANEL[0] * max(columns, 2) + 0.4, PANEL[1] * rows + 0.7), palette)
    panels = []
    for i, task in enumerate(tasks):
        axes = figure.add_subplot(rows, columns, i + 1)
        for position, (name, trials) in enumerate(results.items()):
            if drawn := points(trials, i):
                draw_line(axes, drawn, name, position, level=is_bound([trial.matrix for trial in trials]))
        axes.set_title(
            _shorten(f"{i + 1} {task}"), color=palette.ink, loc="left", fontsize=9, fontweight="bold"
        )
        bare(axes, palette)
        axes.tick_params(labelsize=8)
        panels.append(axes)
    figure.supxlabel(xlabel, color=palette.ink, fontsize=10)
    figure.supylabel(ylabel, color=palette.ink, fontsize=10)
    legend_above(figure, panels, palette)
    return figure, panels


def draw_line(axes, points: Points, name: str, position: int, level: bool = False) -> None:
    """Draw a line of means, with a band of one standard deviation where there are several trials.

    Args:
        axes: where to draw it.
        points: the values.
        name: its name in the legend.
        position: the method's, which decides the colour; see `style`.
        level: whether it is a bound, which is drawn dash-dotted and without points, but for a single one.
    """
    xs = [x for x, _ in points]
    means = np.array([mean(values) for _, values in points])
    axes.plot(
        xs,
        means,
        label=name,
        marker="o",
        markersize=3 if len(xs) == 1 or (len(xs) < 40 and not level) else 0,
        linewidth=1.2 if level else 1.6,
        **style(position) | ({"linestyle": BOUND_LINE} if level else {}),
    )
    deviations = np.array([deviation(values) or 0.0 for _, values in points])
    if deviations.any():
        axes.fill_between(
            xs, means - deviations, means + deviations, color=style(position)["color"], alpha=0.2, linewidth=0
        )


def _shorten(name: str, length: int = 30) -> str:
    """Shorten a title that would reach into the next panel."""
    return name if len(name) <= length else f"{name[: length - 1]}…"
