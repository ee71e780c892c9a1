"""How much of each layer's input space is protected, stage after stage."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from llava_keeplora.report.errors import ReportError
from llava_keeplora.report.figures import LIGHT, Palette, save

#: One mapping per stage (0 = weight basis only, then after each task): layer name -> in, k, part.
Capacity = Sequence[Mapping[str, Mapping]]

COLUMNS = 2  # panels side by side
NAMED_LAYERS = 8  # more lines than this can't be told apart by name


def protected_fraction_plot(capacity: Capacity, path: str | Path, stages: Sequence[str] | None = None) -> list[Path]:
    """Plot the protected fraction k/in of every layer over the stages, one panel per part of the model.

    k is the number of protected directions (columns of the layer's basis) and in the width of its input;
    at 1 the layer can learn nothing more.

    Args:
        capacity: one mapping per stage, layer name -> ``{"in": int, "k": int, "part": str}``; stage 0 is the
            weight basis alone, then one stage after each task. A layer absent from a stage leaves a gap.
        path: the file, with or without ``.png``; an SVG is written beside it.
        stages: a name for every stage; "weights", "task 1", ... when None.

    Returns:
        The PNG's path and the SVG's.

    Raises:
        ReportError: no stage, no layer, a layer without ``in``, ``k`` and ``part``, k not in 0..in, or another number of
            names than stages.
        OSError: the folder is missing, or the disk refuses.
    """
    return save(draw_protected_fraction(capacity, stages), path)


def draw_protected_fraction(
    capacity: Capacity, stages: Sequence[str] | None = None, palette: Palette = LIGHT
) -> Figure:
    """The plot as a figure, in the given palette."""
    parts = _fractions(capacity)
    stages = list(stages) if stages is not None else ["weights", *(f"task {t}" for t in range(1, len(capacity)))]
    if len(stages) != len(capacity):
        raise ReportError(f"{len(capacity)} stages of capacity have {len(stages)} names", "give one name per stage")
    columns = min(COLUMNS, len(parts))
    lines = -(-len(parts) // columns)
    figure = Figure(
        figsize=(max(5.0, 2.5 + 0.45 * len(stages)) * columns, 4.0 * lines),
        facecolor=palette.paper,
        layout="constrained",
    )
    for position, (part, layers) in enumerate(parts.items(), start=1):
        _draw_part(figure, figure.add_subplot(lines, columns, position), part, layers, stages, palette)
    figure.supylabel("protected fraction of the input space (k / in)", color=palette.ink, fontsize=10)
    return figure


def _fractions(capacity: Capacity) -> dict[str, dict[str, list[float]]]:
    """part -> layer -> k/in per stage, layers in the order of the numbers in their names."""
    parts: dict[str, dict[str, list[float]]] = {}
    for stage, layers in enumerate(capacity):
        for name, size in layers.items():
            if not {"in", "k", "part"} <= size.keys():
                raise ReportError(
                    f"layer '{name}' of stage {stage} has the keys {sorted(size)}", "give it 'in', 'k' and 'part'"
                )
            if not 0 <= size["k"] <= size["in"] or size["in"] == 0:
                raise ReportError(
                    f"layer '{name}' of stage {stage} protects {size['k']} of {size['in']} directions",
                    "give 0 <= k <= in, and in above 0",
                )
            line = parts.setdefault(size["part"], {}).setdefault(name, [math.nan] * len(capacity))
            line[stage] = size["k"] / size["in"]
    if not parts:
        raise ReportError("the capacity names no layer", "leave the plot out, or run a method that protects directions")
    # Files keep names in alphabetical order, where layer 10 comes before layer 2.
    return {part: dict(sorted(layers.items(), key=lambda item: _natural(item[0]))) for part, layers in parts.items()}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _draw_part(figure, axes, part: str, layers: dict[str, list[float]], stages: list[str], palette: Palette) -> None:
    colours = _colours(palette)
    last = max(len(layers) - 1, 1)
    few = len(layers) <= NAMED_LAYERS
    for position, (name, line) in enumerate(zip(_short(list(layers)), layers.values())):
        style = {"marker": "o", "markersize": 3} if few or len(stages) == 1 else {}
        axes.plot(line, color=colours(position / last), label=name, linewidth=1.6, **style)
    axes.set_facecolor(palette.paper)
    axes.set_xticks(range(len(stages)), stages, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_ylim(0, 1.02)
    axes.margins(x=0.03)
    axes.grid(color=palette.faint, linewidth=0.5, alpha=0.6)
    axes.tick_params(length=0, colors=palette.ink)
    axes.set_title(f"{part} ({len(layers)} layers)", color=palette.ink, loc="left", fontweight="bold")
    for side in axes.spines.values():
        side.set_visible(False)
    if few:
        legend = axes.legend(fontsize=8, labelcolor=palette.ink, facecolor=palette.paper, edgecolor=palette.faint)
        legend.set_zorder(5)
    else:
        bar = figure.colorbar(ScalarMappable(Normalize(1, len(layers)), colours), ax=axes, aspect=30)
        bar.set_label("layer, first to last", color=palette.ink)
        bar.ax.tick_params(colors=palette.ink)
        bar.outline.set_visible(False)


def _colours(palette: Palette) -> ListedColormap:
    return ListedColormap(colormaps["viridis"](np.linspace(*palette.visible, 256)))


def _short(names: list[str]) -> list[str]:
    """Names without the dotted prefix that all of them share."""
    if len(names) < 2:
        return names
    shared = os.path.commonprefix([name.split(".") for name in names])
    return [".".join(name.split(".")[len(shared) :]) or name for name in names]
