"""Writers of a table of runs: Markdown, LaTeX, CSV and an HTML page, and a report with plots per order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from llava_keeplora.compare.run_table import TableResult
from llava_keeplora.compare.table import BOUND_METRIC, CHOSEN_BY, Order, Table, dotted
from llava_keeplora.compare.tradeoff import TRADEOFF, extremes
from llava_keeplora.files import whole_folder
from llava_keeplora.registries import METHODS
from llava_keeplora.report.html import (
    LEGEND,
    SPREAD,
    PlotImage,
    html_figure,
    html_page,
    html_rows,
    html_table,
)
from llava_keeplora.report.latex_csv import csv_table, latex_table, summary_numbers, summary_records
from llava_keeplora.report.resources import NEEDS_COLUMNS, budget_note, needs_rows
from llava_keeplora.report.results import Results, matrices
from llava_keeplora.report.tables import bounds_note, markdown_table, summary_header, summary_rows
from llava_keeplora.report.watched import NOTE, TITLE, watched_header, watched_rows
from llava_keeplora.report.write_report import write_report
from llava_keeplora.run_folder import COMPARISON_JSON, COMPARISON_TABLE, LATEX_TABLE, REPORT, TABLE, TRIED
from llava_keeplora_eval.files import write_atomic
from llava_keeplora_eval.matrix import MISSING, format_number


@dataclass(frozen=True)
class Section:
    """A titled table of text cells with an explanation."""

    title: str
    text: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_table(table: Table, outcome: TableResult, images: Mapping[str, PlotImage] | None = None) -> str:
    """Write `table.md`, `.tex`, `.csv` and `.json`, `tried.json`, `report.html`, and each order's report.

    Args:
        table: the table.
        outcome: results of its runs, of at least one order or one tried setting.
        images: name → plot, for the page.

    Returns:
        the text of `table.md`.
    """
    with whole_folder(table.output_dir, replace=False) as tmp_dir:
        return _write_files(table, outcome, images or {}, tmp_dir)


def _write_files(table: Table, outcome: TableResult, images: Mapping[str, PlotImage], tmp_dir: Path) -> str:
    title, sections = f"Table {table.output_dir.resolve().name}", sections_of(table, outcome)
    for order, results in outcome.results.items():
        write_report(
            tmp_dir / order,
            f"{title}, order {order}",
            results,
            {**table.order(order).changed(table.run), "methods": outcome.settings},
        )
    texts = {
        TABLE: f"# {title}\n\n"
        + "\n".join(f"## {s.title}\n\n{s.text}\n\n{markdown_table(s.header, s.rows)}" for s in sections),
        LATEX_TABLE: "% Needs \\usepackage{booktabs}.\n"
        + "\n".join(f"% {s.title}: {s.text}\n{latex_table(s.header, s.rows)}\n" for s in sections),
        COMPARISON_TABLE: _csv(outcome),
        COMPARISON_JSON: json.dumps(
            {order: summary_records(results) for order, results in outcome.results.items()}, indent=1
        )
        + "\n",
        REPORT: _page(title, sections, outcome, images),
    }
    if outcome.tried:
        texts[TRIED] = json.dumps([asdict(trial) for trial in outcome.tried], indent=1) + "\n"
    for name, text in texts.items():
        write_atomic(tmp_dir / name, text)
    return texts[TABLE]


def sections_of(table: Table, outcome: TableResult) -> list[Section]:
    """Return a section for each order, one for what guards watch there, and one of the methods' settings."""
    return [
        *(_order_section(table, order, results) for order, results in outcome.results.items()),
        *(
            Section(f"Order {order}: {TITLE.lower()}", NOTE, header, watched_rows(results))
            for order, results in outcome.results.items()
            if (header := watched_header(results))
        ),
        _settings_section(table, outcome),
        *_learning_cost_section(table, outcome),
    ]


def _order_section(table: Table, order: str, results: Results) -> Section:
    trials = [trial for label_trials in results.values() for trial in label_trials]
    seeds = ", ".join(map(str, sorted({trial.seed for trial in trials})))
    needs = {row[0]: row[1:] for row in needs_rows(results)}
    header = [*summary_header(matrices(results)), *NEEDS_COLUMNS[1:]]
    rows = [
        [*row, *needs.get(row[0], [MISSING] * (len(NEEDS_COLUMNS) - 1))]
        for row in summary_rows(matrices(results))
    ]
    text = (
        f"Tasks: {', '.join(trials[0].matrix.tasks)}. Scores in percent, mean ± sample standard deviation; "
        f"seeds {seeds}.{_unfinished(table, order, results)}"
    ) + "".join(f" {note}" for note in (bounds_note(results), budget_note(results)) if note)
    return Section(f"Order {order}", text, header, rows)


def _unfinished(table: Table, order: str, results: Results) -> str:
    """Return a sentence that names the runs not finished yet; empty if all are."""
    unfinished = []
    for label in table.methods:
        done = {trial.seed for trial in results.get(label, ())}
        seeds = [str(seed) for seed in table.order(order).seeds if seed not in done]
        unfinished += [f"{label} with seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"] if seeds else []
    return f" Not finished: {'; '.join(unfinished)}." if unfinished else ""


def _settings_section(table: Table, outcome: TableResult) -> Section:
    """Return the settings of every method.

    For tuned methods these are all settings that were tried, with their scores on the held-out part.
    """
    if table.tuning is None:
        return Section(
            "Settings",
            "The methods ran with these settings.",
            ["method", "settings"],
            [[label, _format_settings(settings)] for label, settings in table.methods.items()],
        )
    tuning = table.tuning
    budget = max((len(settings) for settings in tuning.settings.values()), default=0)
    untuned = ", ".join(label for label in table.methods if not tuning.settings[label])
    text = (
        f"Settings tried for each method{untuned and f' but {untuned}'}: {budget}, on order "
        f"{_describe_order(table.tuning_order)} with seed {tuning.seed}, scored on "
        f"{100 * tuning.holdout:g} % of the training data, which the method did not train on, never on test. "
        "Chosen: the largest "
        f"{' + '.join(tuning.metrics)}{_chosen_bounds(outcome)}."
    )
    rows = [
        [
            f"{trial.label}: {_format_settings(trial.settings)}",
            *(format_number(trial.metrics[name]) for name in CHOSEN_BY),
            "yes" if trial.chosen else "",
        ]
        for trial in outcome.tried
    ]
    tuned = {trial.label for trial in outcome.tried}
    for label in table.methods:
        if label not in tuned:
            what = "taken as it is, none tried" if label in outcome.settings else "not chosen yet"
            rows.append([f"{label}: {what}", *[MISSING] * len(CHOSEN_BY), ""])
    return Section("Settings", text, ["method: setting", *CHOSEN_BY, "chosen"], rows)


def _chosen_bounds(outcome: TableResult) -> str:
    """Return how settings of bounds were chosen; empty if none were tried."""
    others = [name for name in CHOSEN_BY if name != BOUND_METRIC]
    of_bounds = any(
        trial.metrics[BOUND_METRIC] is not None and all(trial.metrics[name] is None for name in others)
        for trial in outcome.tried
    )
    return f"; of bounds, the largest {BOUND_METRIC}" if of_bounds else ""


def _learning_cost_section(table: Table, outcome: TableResult) -> list[Section]:
    """Return what each tuned method reaches when it is tuned for Transfer alone, and for Last alone."""
    rows = []
    for label in table.methods:
        if best := extremes(outcome.tried, label):
            chosen = [best["transfer"], best["last"]]
            rows.append(
                [label]
                + [format_number(trial.metrics[name]) for trial in chosen for name in ("transfer", "last")]
            )
    if not rows:
        return []
    return [
        Section(
            "What learning costs",
            "Of the settings tried: the one with the largest Transfer, and the one with the largest Last, on "
            f"the held-out part. {TRADEOFF}.png shows all settings.",
            ["method", "for Transfer: Transfer", "Last", "for Last: Transfer", "Last"],
            rows,
        )
    ]


def _describe_order(order: Order) -> str:
    """Return an order's name, with its tasks and epochs if it serves the tuning alone."""
    if order.seeds:
        return order.name
    tasks = order.tasks.get("tasks") or [order.tasks["sequence"]]
    epochs = f", {', '.join(map(str, order.epochs))} epochs" if order.epochs else ""
    return f"{order.name} ({', '.join(tasks)}{epochs})"


def _format_settings(settings: Mapping) -> str:
    """Return a method's settings in one line, a plug-in's name without its place on this machine."""
    if isinstance(name := settings.get("method"), str):
        settings = {**settings, "method": METHODS.portable_name(name)}
    return " ".join(dotted(settings)) or MISSING


def _csv(outcome: TableResult) -> str:
    """Return one row per order and run as CSV, unrounded."""
    header: list[str] = []
    rows: list[list[Any]] = []
    for order, results in outcome.results.items():
        header, order_rows = summary_numbers(results)
        rows += [[order, *row] for row in order_rows]
    return csv_table(["order", *header], rows)


def _page(
    title: str, sections: Sequence[Section], outcome: TableResult, images: Mapping[str, PlotImage]
) -> str:
    links = {
        f"Order {order}": f'<p><a href="{escape(order)}/report.html">Matrices, curves, costs</a></p>\n'
        for order in outcome.results
    }
    body = "".join(
        f"<section>\n<h2>{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>\n"
        f"{html_table(section.header, html_rows(section.rows))}{links.get(section.title, '')}</section>\n"
        for section in sections
    )
    figures = "".join(html_figure(name, image) for name, image in images.items())
    return html_page(title, f"<p>{LEGEND}{SPREAD}</p>\n{figures}{body}")
