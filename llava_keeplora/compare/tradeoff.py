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
    COLOURS,
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
from llava_keeplora.report.latex_csv import summary_records
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

#: Markers, used once the colours have run out.
MARKERS = ("o", "s", "^", "D", "v")

Point = tuple[float, float]
#: Label → the numbers of its row in `table.json`.
Records = Mapping[str, Mapping[str, Any]]


def draw_tradeoff(table: Table, outcome: TableResult) -> dict[str, PlotImage]:
    """Plot Transfer against Last as PNG and SVG in the table's folder; nothing where there is no Transfer.

    Returns:
        name of the files → the plot, for the page.
    """
    orders = {f"order {order}, test": summary_records(results) for order, results in outcome.results.items()}
    figure = tradeoff_figure(list(table.methods), outcome.tried, orders)
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


def tradeoff_figure(
    labels: Sequence[str], tried: Sequence[Tried], orders: Mapping[str, Records], palette: Palette = LIGHT
) -> Figure | None:
    """Plot Transfer against Last; None where there is neither a setting nor a row with a Transfer.

    Args:
        labels: the methods' labels, in the order of their colours.
        tried: the settings that were tried, as in `tried.json`.
        orders: title of a panel → label → numbers of the finished rows, as in `table.json`.
        palette: the plot's colours.
    """
    lines = curves(tried)
    orders = {
        name: rows
        for name, rows in orders.items()
        if any(row["transfer_mean"] is not None for row in rows.values())
    }
    panels = [*(["settings tried, held-out part"] if lines else []), *orders]
    if not panels:
        return None
    positions = {label: i for i, label in enumerate([ZERO_SHOT, *labels])}
    width, height = SIZE_OF_PANEL
    figure = new_figure((width * len(panels), height), palette)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, name in zip(axes, panels):
        if name in orders:
            _draw_rows(panel, orders[name], positions)
        else:
            _draw_tried(panel, lines, tried, positions)
        panel.set_title(name, color=palette.ink, loc="left", fontsize=9, fontweight="bold")
        panel.set_xlabel("Last (%)")
        bare(panel, palette)
    axes[0].set_ylabel("Transfer (%)")
    legend_above(figure, list(axes), palette)
    return figure


def _draw_tried(
    axes, lines: Mapping[str, list[Point]], tried: Iterable[Tried], positions: Mapping[str, int]
) -> None:
    for label, points in lines.items():
        axes.plot(*zip(*points), markersize=4, linewidth=1.4, label=label, **_style(positions, label))
    for trial in tried:
        if not trial.chosen:
            continue
        if point := _point(trial.metrics):
            ring = _style(positions, trial.label) | {"linestyle": "none", "marker": "o"}
            axes.plot(*point, markersize=9, fillstyle="none", **ring)
        elif trial.metrics["last"] is not None:
            _draw_bound(axes, trial.label, trial.metrics["last"], positions)


def _draw_bound(axes, label: str, last: float, positions: Mapping[str, int]) -> None:
    look = _style(positions, label) | {"linestyle": BOUND_LINE, "marker": "none"}
    axes.axvline(last, label=label, linewidth=1.2, **look)


def _draw_rows(axes, rows: Records, positions: Mapping[str, int]) -> None:
    for label, row in rows.items():
        look = _style(positions, label)
        if row["transfer_mean"] is not None:
            axes.errorbar(
                row["last_mean"],
                row["transfer_mean"],
                xerr=row["last_sd"],
                yerr=row["transfer_sd"],
                markersize=5,
                label=label,
                **look | {"linestyle": "none"},
            )
        elif row["last_mean"] is not None:
            _draw_bound(axes, label, row["last_mean"], positions)


def _style(positions: Mapping[str, int], label: str) -> dict[str, Any]:
    """Return a method's colour, line style and marker, which tell it where points are not joined."""
    position = positions.get(label, len(positions))
    return style(position) | {"marker": MARKERS[position // len(COLOURS) % len(MARKERS)]}
