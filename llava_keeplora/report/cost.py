"""Costs of every kind of stage: time, and memory where it was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_keeplora.report.figures import Palette, bare, fill, legend_above, new_figure
from llava_keeplora.report.results import Cost, Results, Trial, mean, spread
from llava_keeplora.run_folder import Stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
#: Stage → its name in plots and tables; the other stages take too little time to show.
STAGES = {
    Stage.PREPARED: "prepare the adapters",
    Stage.TRAINED: "train",
    Stage.CONSOLIDATED: "protect what it knows",
    Stage.EVALUATED: "score every task",
}
COST_COLUMNS = ("stage", "seconds, all tasks", "peak memory (MiB)", "of")


def draw_costs(results: Results, palette: Palette) -> Figure | None:
    """Plot seconds and peak memory of each kind of stage, a bar per method; None without a finished stage."""
    costs = {
        name: [[trial.costs[stage] for trial in trials if stage in trial.costs] for stage in STAGES]
        for name, trials in results.items()
    }
    bars = {
        "time, all tasks together (s)": {
            name: [mean(cost.seconds for cost in trials) for trials in stages]
            for name, stages in costs.items()
        },
        "highest peak of memory (GiB)": {
            name: [mean(map(_gib, trials)) for trials in stages] for name, stages in costs.items()
        },
    }
    bars = {
        label: values
        for label, values in bars.items()
        if any(value is not None for line in values.values() for value in line)
    }
    if not bars:
        return None
    size = (5.2 * max(len(bars), 1.2), 1.4 + 0.22 * len(STAGES) * (len(results) + 1))
    figure = new_figure(size, palette)
    panels = figure.subplots(1, len(bars), sharey=True, squeeze=False)[0]
    for axes, (label, values) in zip(panels, bars.items()):
        _draw_bars(axes, values, palette)
        axes.set_xlabel(label)
        bare(axes, palette)
        axes.set_xlim(left=0)
    panels[0].set_yticks(range(len(STAGES)), STAGES.values())
    panels[0].invert_yaxis()
    legend_above(figure, panels, palette)
    return figure


def _gib(cost: Cost) -> float | None:
    return None if cost.peak_bytes is None else cost.peak_bytes / 2**30


def _draw_bars(axes, values: dict[str, list[float | None]], palette: Palette) -> None:
    height = 0.8 / len(values)
    for position, (name, line) in enumerate(values.items()):
        centres = [row + (position - (len(values) - 1) / 2) * height for row in range(len(line))]
        axes.barh(
            centres,
            [math.nan if value is None else value for value in line],
            height,
            label=name,
            **fill(position, palette),
        )


def cost_rows(trials: Sequence[Trial]) -> list[list[str]]:
    """Return the costs as a table: one row per kind of stage, means over the trials."""
    rows = []
    for stage, name in STAGES.items():
        costs = [trial.costs[stage] for trial in trials if stage in trial.costs]
        if costs:
            peaks = [None if cost.peak_bytes is None else cost.peak_bytes / MIB for cost in costs]
            rows.append(
                [
                    name,
                    spread([cost.seconds for cost in costs]),
                    spread(peaks, 0),
                    " / ".join(sorted({cost.peak_of for cost in costs})),
                ]
            )
    return rows
