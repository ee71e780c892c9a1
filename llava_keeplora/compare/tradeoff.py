"""What learning costs: Transfer against Last, over the settings that were tried and of the finished rows.

A method that learns more usually changes more of what the model could before, so one number per method says
little: settings move it along a curve. A method is better where its curve is further above and to the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llava_keeplora.compare.run_table import TableResult, Tried
from llava_keeplora.compare.table import Table
from llava_keeplora.report.figures import (
    BOUND_LINE,
    LIGHT,
    Palette,
    bare,
    encode,
    legend_above,
    new_figure,
    save,
    style,
)
from llava_keeplora.report.html import PlotImage
from llava_keeplora.report.results import Results, deviation, mean
from llava_keeplora_eval.matrix import ZERO_SHOT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Name of the files, without a suffix.
TRADEOFF = "transfer-last"
SIZE_OF_PANEL = (4.6, 4.2)
CAPTION = (
    "Transfer against Last, in percent; above and to the right is better. Lines join the settings tried for "
    "a method, in order of Last, on the held-out part; a ring marks the chosen one. Orders show the finished "
    "rows on test, with one standard deviation; bounds, which have no Transfer, are vertical lines."
)

Point = tuple[float, float]


def draw_tradeoff(table: Table, outcome: TableResult) -> dict[str, PlotImage]:
    """Plot Transfer against Last as PNG and SVG in the table's folder; nothing where there is no Transfer.

    Returns:
        name of the files → the plot, for the page.
    """
    figure = _figure(table, outcome, LIGHT)
    if figure is None:
        return {}
    png = encode(figure, "png")
    save(figure, table.output_dir / f"{TRADEOFF}.png", png)
    return {TRADEOFF: PlotImage(png, CAPTION)}


def curves(tried: Iterable[Tried]) -> dict[str, list[Point]]:
    """Return label → (Last, Transfer) of its settings that have both, in order of Last."""
    points: dict[str, list[Point]] = {}
    for trial in tried:
        if (point := _point(trial.metrics)) is not None:
            points.setdefault(trial.label, []).append(point)
    return {label: sorted(of_label) for label, of_label in points.items()}


def extremes(tried: Sequence[Tried], label: str) -> dict[str, Tried] | None:
    """Return `transfer` and `last` → a method's setting with the largest of it; None without Transfer."""
    trials = [trial for trial in tried if trial.label == label and _point(trial.metrics) is not None]
    return (
        {name: max(trials, key=lambda t: t.metrics[name]) for name in ("transfer", "last")}
        if trials
        else None
    )


def _point(metrics: Mapping[str, Any]) -> Point | None:
    last, transfer = metrics["last"], metrics["transfer"]
    return None if last is None or transfer is None else (last, transfer)


def _figure(table: Table, outcome: TableResult, palette: Palette) -> Figure | None:
    tried = curves(outcome.tried)
    orders = {order: results for order, results in outcome.results.items() if _rows(results)}
    panels = [*(["tried"] if tried else []), *orders]
    if not panels:
        return None
    positions = {label: i for i, label in enumerate([ZERO_SHOT, *table.methods])}
    width, height = SIZE_OF_PANEL
    figure = new_figure((width * len(panels), height), palette)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, name in zip(axes, panels):
        if name in orders:
            _draw_rows(panel, orders[name], positions)
            title = f"order {name}, test"
        else:
            _draw_tried(panel, tried, outcome.tried, positions)
            title = "settings tried, held-out part"
        panel.set_title(title, color=palette.ink, loc="left", fontsize=9, fontweight="bold")
        panel.set_xlabel("Last (%)")
        bare(panel, palette)
    axes[0].set_ylabel("Transfer (%)")
    legend_above(figure, list(axes), palette)
    return figure


def _draw_tried(
    axes, tried: Mapping[str, list[Point]], trials: Iterable[Tried], positions: Mapping[str, int]
) -> None:
    for label, points in tried.items():
        axes.plot(
            *zip(*points), marker="o", markersize=4, linewidth=1.4, label=label, **style(positions[label])
        )
    for trial in trials:
        if trial.chosen and (point := _point(trial.metrics)):
            axes.plot(
                *point,
                marker="o",
                markersize=9,
                fillstyle="none",
                linestyle="none",
                color=style(positions[trial.label])["color"],
            )


def _draw_rows(axes, results: Results, positions: Mapping[str, int]) -> None:
    rows = _rows(results)
    for label, (lasts, transfers) in rows.items():
        axes.errorbar(
            mean(lasts),
            mean(transfers),
            xerr=deviation(lasts),
            yerr=deviation(transfers),
            marker="o",
            markersize=5,
            label=label,
            **style(positions.get(label, len(positions))) | {"linestyle": "none"},
        )
    for label, trials in results.items():
        if label not in rows and None not in (lasts := [t.matrix.metrics()["last"] for t in trials]):
            axes.axvline(
                mean(lasts),
                label=label,
                linewidth=1.2,
                **style(positions.get(label, len(positions))) | {"linestyle": BOUND_LINE},
            )


def _rows(results: Results) -> dict[str, tuple[list[float], list[float]]]:
    """Return label → Last and Transfer of its trials; bounds, which have no Transfer, are left out."""
    rows = {}
    for label, trials in results.items():
        points = [point for trial in trials if (point := _point(trial.matrix.or_constant().metrics()))]
        if len(points) == len(trials):
            rows[label] = ([last for last, _ in points], [transfer for _, transfer in points])
    return rows
