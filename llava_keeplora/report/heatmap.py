"""Heat maps of the accuracy matrix: the score of every task after every stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava_keeplora.report.figures import LIGHT, Palette, new_figure, save
from llava_keeplora_eval.matrix import MISSING, ZERO_SHOT, Matrix, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

COLOURS = "viridis"
#: Most columns with which the cells show their numbers; the tables always do.
MOST_NUMBERS = 20
GAP = 0.25  # rows between the zero-shot row and the trained ones


def heatmap(matrix: Matrix, path: str | Path, title: str = "") -> list[Path]:
    """Draw an annotated heat map of a matrix, the zero-shot row on top and the diagonal outlined.

    Tasks left of the outline were learned before; those right of it have not been learned yet.

    Args:
        matrix: what to draw; cells not measured are left blank.
        path: the file, with or without ``.png``; an SVG is written next to it.
        title: a line above the plot.

    Returns:
        The PNG's path and the SVG's.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    return save(draw_heatmap(matrix, title), path)


def draw_heatmap(
    matrix: Matrix, title: str = "", palette: Palette = LIGHT, limits: tuple[float, float] | None = None
) -> Figure:
    """Return the heat map as a figure.

    Args:
        matrix: what to draw.
        title: a line above.
        palette: its colours.
        limits: the ends of the colour scale in percent, to give several matrices one scale; those of this
            matrix when None.
    """
    top = 0 if matrix.zero_shot is None else 1 + GAP
    named = matrix.labelled_rows()
    tops = [t + GAP * (top > 0 and t > 0) for t in range(len(named))]
    rows = [(y, row) for y, (_, row) in zip(tops, named, strict=True)]
    labels = {y: name for y, (name, _) in zip(tops, named, strict=True)}
    figure, axes = draw_cells(
        matrix.tasks, rows, title, "score (%)", limits or colour_limits([matrix]), palette
    )
    from matplotlib.patches import Rectangle  # see figures.new_figure

    for t in range(0 if matrix.bound else len(matrix.tasks)):
        box = Rectangle(
            (t, top + t), 1, 1, fill=False, edgecolor=palette.ink, linewidth=2.2, zorder=3, clip_on=False
        )
        axes.add_patch(box)
    axes.set_yticks([y + 0.5 for y in labels], list(labels.values()))
    axes.set_xlabel("scored task", color=palette.ink)
    axes.set_ylabel("after training", color=palette.ink)
    return figure


def draw_cells(
    columns: Sequence[str],
    rows: Sequence[tuple[float, Sequence[float | None]]],
    title: str,
    unit: str,
    limits: tuple[float, float],
    palette: Palette,
    precision: int = 1,
) -> tuple[Figure, Axes]:
    """Draw coloured cells with their numbers in them, and the scale of the colours.

    Args:
        columns: names of the columns.
        rows: (top edge in units of a row's height, values) of each row.
        title: a line above.
        unit: unit of the numbers, next to the scale.
        limits: the ends of the colour scale.
        palette: the colours.
        precision: number of decimals.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    height = rows[-1][0] + 1
    name_width = max(len(name) for name in [*columns, ZERO_SHOT])
    figure = new_figure(
        (2.2 + 0.075 * name_width + 0.62 * len(columns), 1.6 + 0.05 * name_width + 0.42 * height), palette
    )
    axes = figure.add_subplot(facecolor=palette.paper)
    scale = Normalize(*limits)
    for top, row in rows:
        _draw_row(axes, row, top, scale, palette, precision)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(height, 0)
    axes.set_xticks(
        [x + 0.5 for x in range(len(columns))], columns, rotation=40, ha="right", rotation_mode="anchor"
    )
    axes.tick_params(length=0, colors=palette.ink)
    axes.set_title(title, color=palette.ink, loc="left", fontsize=12, fontweight="bold")
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(ScalarMappable(scale, colormaps[COLOURS]), ax=axes, shrink=0.8, aspect=25, pad=0.02)
    bar.set_label(unit, color=palette.ink)
    bar.ax.tick_params(colors=palette.ink)
    bar.outline.set_visible(False)
    return figure, axes


def colour_limits(matrices: Iterable[Matrix]) -> tuple[float, float]:
    """Return the multiples of ten around the values, so that scores between 60 and 95 show their contrast."""
    rows = [row for matrix in matrices for _, row in matrix.labelled_rows()]
    values = [value for row in rows for value in row if value is not None] or [0.0, 100.0]
    low, high = 10 * math.floor(min(values) / 10), 10 * math.ceil(max(values) / 10)
    return low, max(high, low + 10)


def _draw_row(axes, row, y: float, scale: Normalize, palette: Palette, precision: int) -> None:
    values = np.ma.masked_invalid([[np.nan if value is None else float(value) for value in row]])
    # One mesh per row: a patch per cell would take most of the time of a large plot.
    mesh = axes.pcolormesh(
        np.arange(len(row) + 1),
        [y, y + 1],
        values,
        norm=scale,
        cmap=COLOURS,
        edgecolors=palette.paper,
        linewidth=1,
    )
    mesh.set_in_layout(False)
    if len(row) > MOST_NUMBERS:
        return
    from matplotlib import colormaps

    for x, value in enumerate(row):
        ink = palette.faint if value is None else _readable_on(colormaps[COLOURS](float(scale(value))))
        text = format_number(value, precision, MISSING)
        # Left out of the layout, which would measure every cell twice: seconds with eleven tasks.
        axes.text(
            x + 0.5, y + 0.5, text, ha="center", va="center", color=ink, fontsize=9, zorder=4, in_layout=False
        )


def _readable_on(colour) -> str:
    """Return black or white, by the relative luminance of the background (WCAG 2.1)."""
    channels = np.asarray(colour[:3])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return "#000000" if linear @ [0.2126, 0.7152, 0.0722] > 0.18 else "#ffffff"
