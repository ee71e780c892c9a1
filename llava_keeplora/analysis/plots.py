"""Plots of the analyses: scores over the energy of the principal part, and where updates lie."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llava_keeplora.analysis.results import PLACES, Knowledge, MethodUpdates
from llava_keeplora.report.figures import Palette, bare, fill, legend_above, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = (4.2, 3.2)  # inches
#: Side of the weights → its line style, and the energy at which that side is the complete weight.
LINES = {"principal": ("-", 1.0), "residual": ("--", 0.0)}


def draw_knowledge(knowledge: Knowledge, palette: Palette) -> Figure:
    """Draw the mean score over the share of energy.

    There is a panel per part, a colour per group of tasks, and a line style per side of the weights.
    """
    figure = new_figure((PANEL[0] * len(knowledge.parts), PANEL[1] + 0.5), palette)
    panels = figure.subplots(1, len(knowledge.parts), sharey=True, squeeze=False)[0]
    for axes, part in zip(panels, knowledge.parts):
        for position, group in enumerate(knowledge.tasks):
            for side, (line, end) in LINES.items():
                points = sorted(
                    [*knowledge.line(part, side, group), (end, knowledge.mean(group, knowledge.whole))]
                )
                line_style = style(position) | {"linestyle": line}
                axes.plot(
                    [100 * p for p, _ in points],
                    [value for _, value in points],
                    label=f"{group}, {side} part",
                    marker="o",
                    markersize=3,
                    linewidth=1.6,
                    **line_style,
                )
        axes.set_title(part, color=palette.ink, loc="left", fontweight="bold")
        axes.set_xlabel("energy of the weights in the principal part (%)")
        bare(axes, palette)
    panels[0].set_ylabel("mean score (%)", color=palette.ink)
    legend_above(figure, panels, palette)
    return figure


def draw_places(updates: MethodUpdates, title: str, palette: Palette) -> Figure:
    """Draw where each task's update lies, a panel per part and a bar per task.

    A mark shows the principal share that a random update would have.
    """
    width = max(PANEL[0], 1.2 + 0.5 * len(updates.tasks))
    figure = new_figure((width * len(updates.parts), PANEL[1] + 0.9), palette)
    panels = figure.subplots(1, len(updates.parts), sharey=True, squeeze=False)[0]
    for axes, part in zip(panels, updates.parts):
        shares = [updates.shares(part, task) for task in updates.tasks]
        bottom = [0.0] * len(shares)
        for position, (place, name) in enumerate(PLACES.items()):
            heights = [share[place] or 0.0 for share in shares]
            axes.bar(range(len(shares)), heights, 0.7, bottom, label=name, **fill(position, palette))
            bottom = [low + height for low, height in zip(bottom, heights)]
        axes.scatter(
            range(len(shares)),
            [share["random"] or math.nan for share in shares],
            marker="_",
            s=260,
            color=palette.ink,
            label="principal, of a random update",
            zorder=3,
        )
        axes.set_xticks(range(len(shares)), updates.tasks, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_title(f"{title}: {part}", color=palette.ink, loc="left", fontweight="bold")
        axes.set_ylim(0, 1.02)
        bare(axes, palette)
    panels[0].set_ylabel("share of the update's energy", color=palette.ink)
    legend_above(figure, panels, palette)
    return figure
