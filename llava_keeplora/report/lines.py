"""Plots with a line per layer, in a panel per part of the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llava_keeplora.report.figures import Palette, bare, new_figure
from llava_keeplora.report.results import LayerLines

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

COLUMNS = 2  # panels side by side
NAMED_LAYERS = 8  # more lines than this can't be distinguished by name


def draw_layer_lines(parts: LayerLines, stages: Sequence[str], ylabel: str, palette: Palette) -> Figure:
    """Plot shares in 0..1 of every layer over stages or tasks, one panel per part.

    Args:
        parts: part -> layer -> its numbers.
        stages: a name for every position on the x axis.
        ylabel: label of the y axis.
        palette: the colours.
    """
    columns = min(COLUMNS, len(parts))
    rows = -(-len(parts) // columns)
    figure = new_figure((max(5.0, 2.5 + 0.45 * len(stages)) * columns, 4.0 * rows), palette)
    for position, (part, layers) in enumerate(parts.items(), start=1):
        _draw_part(figure, figure.add_subplot(rows, columns, position), part, layers, stages, palette)
    figure.supylabel(ylabel, color=palette.ink, fontsize=10)
    return figure


def _draw_part(figure, axes, part: str, layers, stages: Sequence[str], palette: Palette) -> None:
    colours = _colours(palette)
    last = max(len(layers) - 1, 1)
    few = len(layers) <= NAMED_LAYERS
    for position, (name, line) in enumerate(zip(_short(list(layers)), layers.values())):
        style = {"marker": "o", "markersize": 3} if few or len(stages) == 1 else {}
        axes.plot(line, color=colours(position / last), label=name, linewidth=1.6, **style)
    axes.set_xticks(range(len(stages)), stages, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_ylim(0, 1.02)
    axes.margins(x=0.03)
    bare(axes, palette)
    axes.set_title(f"{part} ({len(layers)} layers)", color=palette.ink, loc="left", fontweight="bold")
    if few:
        legend = axes.legend(
            fontsize=8, labelcolor=palette.ink, facecolor=palette.paper, edgecolor=palette.faint
        )
        legend.set_zorder(5)
    else:
        from matplotlib.cm import ScalarMappable  # see figures.new_figure
        from matplotlib.colors import Normalize

        bar = figure.colorbar(ScalarMappable(Normalize(1, len(layers)), colours), ax=axes, aspect=30)
        bar.set_label("layer, first to last", color=palette.ink)
        bar.ax.tick_params(colors=palette.ink)
        bar.outline.set_visible(False)


def _colours(palette: Palette) -> ListedColormap:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(*palette.visible, 256)))


def _short(names: list[str]) -> list[str]:
    """Return names without the dotted prefix that all of them share."""
    if len(names) < 2:
        return names
    shared = os.path.commonprefix([name.split(".") for name in names])  # noqa: RUF071  of lists of parts
    return [".".join(name.split(".")[len(shared) :]) or name for name in names]
