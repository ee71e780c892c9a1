"""The pictures of an analysis: scores over the energy that is left, and where updates lie."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llava_keeplora.report.figures import Palette, bare, fill, legend_above, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llava_keeplora.analysis.knowledge import Knowledge
    from llava_keeplora.analysis.updates import MethodUpdates

PANEL = (4.2, 3.2)  # inches
#: Side of a cut → how its lines are drawn, and the energy at which that side is the whole weight.
LINES = {"principal": ("-", 1.0), "residual": ("--", 0.0)}
PLACES = {"principal": "principal subspace", "features": "earlier tasks' features", "outside": "outside both"}


def draw_knowledge(found: Knowledge, palette: Palette) -> Figure:
    """Draw the mean score over the share of energy: a panel per part, a colour per group of tasks."""
    figure = new_figure((PANEL[0] * len(found.parts), PANEL[1] + 0.5), palette)
    panels = figure.subplots(1, len(found.parts), sharey=True, squeeze=False)[0]
    for axes, part in zip(panels, found.parts):
        for position, group in enumerate(found.tasks):
            for side, (line, end) in LINES.items():
                points = sorted([*found.line(part, side, group), (end, found.mean(group, found.whole))])
                look = style(position) | {"linestyle": line}
                axes.plot(
                    [100 * p for p, _ in points],
                    [value for _, value in points],
                    label=f"{group}, {side} part",
                    marker="o",
                    markersize=3,
                    linewidth=1.6,
                    **look,
                )
        axes.set_title(part, color=palette.ink, loc="left", fontweight="bold")
        axes.set_xlabel("energy of the weights in the principal part (%)")
        bare(axes, palette)
    panels[0].set_ylabel("mean score (%)", color=palette.ink)
    legend_above(figure, panels, palette)
    return figure


def draw_places(one: MethodUpdates, title: str, palette: Palette) -> Figure:
    """Where each task's update lies, a panel per part and a bar per task.

    A mark where a random update's principal share would end.
    """
    width = max(PANEL[0], 1.2 + 0.5 * len(one.tasks))
    figure = new_figure((width * len(one.parts), PANEL[1] + 0.9), palette)
    panels = figure.subplots(1, len(one.parts), sharey=True, squeeze=False)[0]
    for axes, part in zip(panels, one.parts):
        shares = [one.shares(part, task) for task in one.tasks]
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
        axes.set_xticks(range(len(shares)), one.tasks, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_title(f"{title}: {part}", color=palette.ink, loc="left", fontweight="bold")
        axes.set_ylim(0, 1.02)
        bare(axes, palette)
    panels[0].set_ylabel("share of the update's energy", color=palette.ink)
    legend_above(figure, panels, palette)
    return figure
