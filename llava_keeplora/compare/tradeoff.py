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
    label_points,
    legend_above,
    new_figure,
    save,
    style,
)
from llava_keeplora.report.html import PlotImage
from llava_keeplora.report.latex_csv import summary_records
from llava_keeplora_eval.matrix import ZERO_SHOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Name of the files, without a suffix.
TRADEOFF = "transfer-last"
SIZE_OF_PANEL = (5.0, 4.6)
LAST = "Last: mean score after the final task (%)"
TRANSFER = "Transfer: mean score on tasks not yet learned (%)"
CAPTION = (
    "Transfer against Last, in percent; above and to the right is better. A line joins the settings tried "
    "for a method, on the held-out part, if they differ in one number, in the order of that number (a "
    "learning rate, a weight); other settings are points alone. A ring marks the chosen one. Orders show the "
    "finished rows on test, with one standard deviation; bounds, which have no Transfer, are vertical lines, "
    "and rows of which no setting was tried are grey."
)

#: Markers, used once the colours have run out.
MARKERS = ("o", "s", "^", "D", "v")
#: Marker of the untouched model, which is larger than others to look as large.
ZERO_SHOT_MARKER, ZERO_SHOT_SIZE = "*", 11
#: Colour of rows that are shown for comparison.
GREY = "#8a9099"

Point = tuple[float, float]
#: Label → the numbers of its row in `table.json`.
Records = Mapping[str, Mapping[str, Any]]
#: Label → how its points and lines look.
Looks = Mapping[str, dict[str, Any]]


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
    """Return label → (Last, Transfer) of its settings that have both, in the order of the settings.

    That is the order of the one number in which a method's settings differ, or the order of the table where
    they differ in more (``joined``).
    """
    trials: dict[str, list[Tried]] = {}
    for trial in tried:
        if _point(trial.metrics) is not None:
            trials.setdefault(trial.label, []).append(trial)
    ordered = {label: _in_order(of_label) or of_label for label, of_label in trials.items()}
    return {
        label: [point for trial in of_label if (point := _point(trial.metrics)) is not None]
        for label, of_label in ordered.items()
    }


def joined(tried: Sequence[Tried], label: str) -> bool:
    """Return whether a method's settings differ in one number, so that a line through them has a meaning."""
    return _in_order([trial for trial in tried if trial.label == label]) is not None


def _in_order(trials: Sequence[Tried]) -> list[Tried] | None:
    """Return settings in the order of the one number in which they differ; None where there is no such."""
    flat = [dict(_leaves(trial.settings)) for trial in trials]
    names = {name for one in flat for name in one}
    varying = [name for name in names if any(one.get(name) != flat[0].get(name) for one in flat)]
    if len(varying) != 1:
        return None
    values = [one.get(varying[0]) for one in flat]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return None
    return [trials[i] for i in sorted(range(len(trials)), key=values.__getitem__)]


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


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
    labels: Sequence[str],
    tried: Sequence[Tried],
    orders: Mapping[str, Records],
    palette: Palette = LIGHT,
    coloured: Sequence[str] | None = None,
) -> Figure | None:
    """Plot Transfer against Last; None where there is neither a setting nor a row with a Transfer.

    Args:
        labels: the methods' labels, in the order of their colours.
        tried: the settings that were tried, as in `tried.json`.
        orders: title of a panel → label → numbers of the finished rows, as in `table.json`.
        palette: the plot's colours.
        coloured: the labels in colour and in the legend, by default those with settings tried (all where no
            setting was); the points and curves of others are grey, with their label beside them.
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
    if coloured is None:
        coloured = [label for label in labels if label in lines] or labels
    looks = method_looks(coloured, palette)
    width, height = SIZE_OF_PANEL
    figure = new_figure((width * len(panels), height), palette)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, name in zip(axes, panels):
        if name in orders:
            draw_rows(panel, orders[name], looks)
        else:
            _draw_tried(panel, lines, tried, looks, palette)
        panel.set_title(name, color=palette.ink, loc="left", fontsize=9, fontweight="bold")
        panel.set_xlabel(LAST)
        panel.margins(0.1)  # room for names
        panel.locator_params(steps=[1, 2, 5, 10])
        bare(panel, palette)
    axes[0].set_ylabel(TRANSFER)
    legend_above(figure, list(axes), palette)
    for panel, name in zip(axes, panels):
        if name in orders:
            label_rows(panel, orders[name], _in_grey(orders[name], looks), palette)
        else:
            _label_curves(panel, lines, looks, palette)
    return figure


def method_looks(labels: Sequence[str], palette: Palette = LIGHT) -> Looks:
    """Return label → colour, line style and marker, each colour once before any comes again."""
    looks: dict[str, dict[str, Any]] = {
        label: style(i) | {"marker": MARKERS[i // len(COLOURS) % len(MARKERS)], "markersize": 6}
        for i, label in enumerate(label for label in labels if label != ZERO_SHOT)
    }
    zero_shot = {"color": palette.ink, "marker": ZERO_SHOT_MARKER, "markersize": ZERO_SHOT_SIZE}
    return looks | {ZERO_SHOT: zero_shot}


def _draw_tried(
    axes: Axes,
    lines: Mapping[str, list[Point]],
    tried: Sequence[Tried],
    looks: Looks,
    palette: Palette,
) -> None:
    for label, points in lines.items():
        known = label in looks
        look = looks.get(label, {"color": GREY, "marker": "o"}) | {"markersize": 4 if known else 2.5}
        look |= {"linewidth": 1.4 if known else 0.8, "zorder": 2 if known else 1.5}
        if not joined(tried, label):
            look["linestyle"] = "none"
        axes.plot(*zip(*points), label=label if known else f"_{label}", **look)
    for trial in tried:
        if not trial.chosen:
            continue
        if point := _point(trial.metrics):
            colour = looks.get(trial.label, {"color": GREY})["color"]
            axes.plot(*point, markersize=10, fillstyle="none", linestyle="none", marker="o", color=colour)
        elif trial.metrics["last"] is not None:
            _draw_bound(axes, trial.label, trial.metrics["last"], palette.ink)
    for trial in tried:
        if (transfer := trial.metrics.get("zero_shot_transfer")) is not None:
            # The untouched model's score after the last task is that over all tasks.
            last = trial.metrics["zero_shot_average"]
            axes.plot(last, transfer, label=ZERO_SHOT, linestyle="none", **looks[ZERO_SHOT])
            break


def _label_curves(axes: Axes, lines: Mapping[str, list[Point]], looks: Looks, palette: Palette) -> None:
    """Write the names of grey curves next to their last points."""
    bars = 0.0, 0.0
    points = {f"{label} {i}": (*point, *bars) for label, of in lines.items() for i, point in enumerate(of)}
    ends = {label: (*of[-1], *bars) for label, of in lines.items()}
    label_points(axes, points | ends, [], _in_grey(lines, looks), palette)


def _in_grey(labels: Iterable[str], looks: Looks) -> dict[str, str]:
    """Return the labels that have no look, the longest first, as it has the fewest places, each → grey."""
    return dict.fromkeys(
        sorted((label for label in labels if label not in looks), key=len, reverse=True), GREY
    )


def _draw_bound(axes: Axes, label: str, last: float, colour: str) -> None:
    # An underscore keeps a line out of the legend: its name is written along it.
    axes.axvline(last, label=f"_{label}", linewidth=1.2, linestyle=BOUND_LINE, color=colour)
    axes.annotate(
        label,
        (last, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=8,
        color=colour,
    )


def draw_rows(axes: Axes, rows: Records, looks: Looks) -> None:
    """Draw finished rows as points with one standard deviation, and bounds as vertical lines.

    Args:
        axes: where to draw; ``label_rows`` writes names once its limits are final.
        rows: label → the numbers of its row in `table.json`.
        looks: label → how it looks; other rows are small and grey.
    """
    for label, row in rows.items():
        if row["transfer_mean"] is not None:
            known = label in looks
            look = looks[label] if known else {"color": GREY, "marker": "o", "markersize": 4}
            axes.errorbar(
                row["last_mean"],
                row["transfer_mean"],
                xerr=row["last_sd"],
                yerr=row["transfer_sd"],
                label=label if known else f"_{label}",
                **look | {"linestyle": "none", "zorder": 3 if known else 2},
            )
        elif row["last_mean"] is not None:
            _draw_bound(axes, label, row["last_mean"], GREY)


def label_rows(
    axes: Axes, rows: Records, colours: Mapping[str, str], palette: Palette = LIGHT, **text: Any
) -> None:
    """Write names next to the points of rows, none over another point or name.

    Args:
        axes: the panel that ``draw_rows`` drew them in.
        rows: label → the numbers of its row in `table.json`.
        colours: label → colour of its name, in the order of their claim to a place; others get none.
        palette: the plot's colours.
        text: settings of the names, as of matplotlib's `Text`.
    """
    points = {
        label: (row["last_mean"], row["transfer_mean"], row["last_sd"] or 0.0, row["transfer_sd"] or 0.0)
        for label, row in rows.items()
        if row["transfer_mean"] is not None
    }
    bounds = [
        row["last_mean"]
        for row in rows.values()
        if row["transfer_mean"] is None and row["last_mean"] is not None
    ]
    named = {label: colour for label, colour in colours.items() if label in points}
    label_points(axes, points, bounds, named, palette, **text)
