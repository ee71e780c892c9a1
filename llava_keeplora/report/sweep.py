"""Plot of metrics over the values of a setting, one panel per metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llava_keeplora.report.curves import draw_line
from llava_keeplora.report.figures import BOUND_LINE, Palette, bare, legend_above, new_figure, style
from llava_keeplora.report.results import Results, Trial, is_bound, mean
from llava_keeplora.report.tables import COLUMNS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The metrics that are plotted; the others are differences of scores.
METRICS = ("Transfer", "Average", "Last")


def draw_sweep(
    results: Results,
    method: str,
    sweep: Mapping[float, str],
    levels: Sequence[str],
    xlabel: str,
    palette: Palette,
) -> Figure | None:
    """Plot Transfer, Average and Last over a setting; None where no value of it has results.

    Args:
        results: name → trials.
        method: label of the method, for the legend.
        sweep: value of the setting → the name of its trials; names without results are left out.
        levels: names that are drawn as horizontal lines for comparison; those without results are left out.
        xlabel: label of the x axis.
        palette: the colours.
    """
    swept = {value: results[name] for value, name in sorted(sweep.items()) if name in results}
    if not swept:
        return None
    figure = new_figure((10.4, 3.4), palette)
    panels = figure.subplots(1, len(METRICS))
    for axes, title in zip(panels, METRICS):
        points = [(value, _numbers(trials, title)) for value, trials in swept.items()]
        # Transfer is undefined with one task.
        draw_line(axes, [(value, numbers) for value, numbers in points if None not in numbers], method, 0)
        for position, name in enumerate(levels, start=1):
            trials = results.get(name, ())
            level = mean(_numbers(trials, title)) if trials else None
            line = BOUND_LINE if is_bound([trial.matrix.or_constant() for trial in trials]) else "--"
            if level is not None:
                axes.axhline(level, label=name, linewidth=1.2, **style(position) | {"linestyle": line})
        axes.set_title(title, color=palette.ink, loc="left", fontsize=9, fontweight="bold")
        axes.set_xlabel(xlabel)
        bare(axes, palette)
    panels[0].set_ylabel("score (%)")
    legend_above(figure, list(panels), palette)
    return figure


def _numbers(trials: Sequence[Trial], title: str) -> list[float | None]:
    """Return one aggregate of every trial; for a model that never changes, that of its constant matrix."""
    return [trial.matrix.or_constant().metrics()[COLUMNS[title]] for trial in trials]
