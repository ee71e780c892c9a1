"""A self-contained HTML page: no script, no network, plots embedded as data URIs."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from llava_keeplora.report.cost import COST_COLUMNS, cost_rows
from llava_keeplora.report.figures import DPI
from llava_keeplora.report.resources import NEEDS_COLUMNS, budget_note, needs_rows
from llava_keeplora.report.results import (
    Results,
    Trial,
    is_bound,
    matrices,
    mean_matrix,
    mean_scores,
    row_marks,
)
from llava_keeplora.report.routes import route_table
from llava_keeplora.report.tables import (
    SCORE_COLUMNS,
    matrix_rows,
    metric_rows,
    of_seeds,
    score_rows,
    summary_header,
    summary_rows,
    zero_shot_constants,
)
from llava_keeplora.report.watched import NOTE, TITLE, stage_table, watched_header, watched_rows
from llava_keeplora.report.wrong_answers import (
    CONFUSION_COLUMNS,
    ERROR_COLUMNS,
    confusion_rows,
    error_rows,
)

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2024; --dim: #5c646d; --line: #dfe3e7;
  --band: #f5f7f9; --learned: #e3eefc; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #16191d; --ink: #e6e8eb; --dim: #9aa3ad; --line: #30363d;
  --band: #1d2126; --learned: #1d3a5f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p, figcaption { color: var(--dim); max-width: 65ch; }
figcaption { font-size: .9rem; }
.wide { overflow-x: auto; }
.wide + .wide { margin-top: 1.25rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
thead th { color: var(--dim); font-weight: 600; white-space: normal; vertical-align: bottom; }
tr.own td, tr.own th { background: var(--band); }
td.learned { background: var(--learned); font-weight: 600; }
figure { margin: 1rem 0; }
img { height: auto; display: block; }
/* White becomes the page's dark paper, and lines and bars keep their hue. A map's colours are numbers and
  stay. */
@media (prefers-color-scheme: dark) { img { filter: invert(.91) hue-rotate(180deg); }
  img[alt^="heatmap"], img[alt^="overlap"] { filter: none; border-radius: .4rem; } }
summary { cursor: pointer; margin: .75rem 0; }
.verdict h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
.verdict h4 { margin: 1.5rem 0 .5rem; }
.verdict p, .verdict li { max-width: none; color: var(--ink); }
.verdict h2 { margin-top: 1rem; }
.ship, .dont { padding: .1rem .5rem; border-radius: .3rem; color: #fff; background: #1a7f37; }
.dont { background: #b42318; }
.changes { padding: 0; list-style: none; }
.changes li { padding-left: .75rem; border-left: .25rem solid var(--line); margin: .35rem 0; }
.changes .worse { border-color: #b42318; } .changes .better { border-color: #1a7f37; }
.flips { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: .75rem; }
.flips figure { display: flex; gap: .75rem; margin: 0; padding: .6rem; border: 1px solid var(--line);
  border-radius: .4rem; }
.flips.wordy { grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
.flips.wordy img { width: 8rem; } .flips figcaption { flex: 1; min-width: 0; overflow-wrap: break-word; }
.flips img { width: 5rem; flex: none; align-self: flex-start; filter: none; }
.flips dl { grid-template-columns: max-content minmax(0, 1fr); gap: 0 .6rem; margin: 0; }
.flips dt { margin: 0; } .verdict td:nth-child(2), .verdict th:nth-child(2) { text-align: left; }
.flips .asked { margin: 0 0 .25rem; color: var(--ink); }
.flips dd { color: var(--ink); max-height: 7.5em; overflow-y: auto; }
.flips dd.after { color: #d1372a; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .25rem 1.25rem; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dt { margin-top: .5rem; } }
"""

LEGEND = (
    "Percent. Transfer: how well a task is done before it is learned. Average: over all stages. Last: at the "
    "end. "
    "Forgetting: mean drop from the score right after learning; BWT: the same with the other sign. "
    "The zero-shot row is a model that never changes."
)
BOUNDS = (
    " Bounds, dash-dotted in plots, are learned in no order and have Last alone: individual has a model for "
    "every task, joint learns all tasks at once."
)
SPREAD = " Mean ± sample standard deviation (n − 1) over n seeds; plots and matrices show means."
CSS_PIXELS_PER_INCH = 96
READABLE = 0.6  # smallest scale of a plot at which the numbers in its cells can be read


@dataclass(frozen=True)
class PlotImage:
    """A plot as PNG bytes with its caption; on a dark page, light and dark are swapped."""

    png: bytes
    caption: str


def render_page(
    title: str, results: Results, images: Mapping[str, PlotImage], settings: Mapping, head: str = ""
) -> str:
    """Return the whole page as HTML.

    Args:
        title: the page's title.
        results: label -> trials, in display order.
        images: the plots in display order: ``KIND`` for those of all methods together, ``KIND/LABEL`` for
            those of one method.
        settings: the run's settings; values other than strings are shown as JSON.
        head: HTML that comes first.
    """
    joint = "".join(html_figure(name, image) for name, image in images.items() if "/" not in name)
    joint = f"<section>\n<h2>Side by side</h2>\n{joint}</section>\n" if joint else ""
    sections = "".join(
        _run_section(label, trials, images)
        for label, trials in results.items()
        if f"heatmap/{label}" in images
    )
    head += "<h2>Scores</h2>\n" if head else ""
    return html_page(title, f"{head}{_summary(results)}{joint}{sections}{_settings(settings)}")


def html_page(title: str, body: str) -> str:
    """Return a page with its style sheet embedded.

    Args:
        title: the title as plain text.
        body: the body as HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{body}</main>\n</body>\n</html>\n"
    )


def _summary(results: Results) -> str:
    by_name = matrices(results)
    constant = zero_shot_constants(by_name)
    body = "".join(_row(row, highlight=row[0] in constant) for row in summary_rows(by_name))
    spread = SPREAD if any(len(trials) > 1 for trials in results.values()) else ""
    needs = needs_rows(results)
    resources = html_table(NEEDS_COLUMNS, html_rows(needs)) if needs else ""
    resources += f"<p>{escape(note)}</p>\n" if (note := budget_note(results)) else ""
    if header := watched_header(results):
        resources += (
            f"<h3>{TITLE}</h3>\n<p>{NOTE}</p>\n{html_table(header, html_rows(watched_rows(results)))}"
        )
    bounds = BOUNDS if any(map(is_bound, by_name.values())) else ""
    return f"<p>{LEGEND}{bounds}{spread}</p>\n{html_table(summary_header(by_name), body)}{resources}"


def _run_section(label: str, trials: Sequence[Trial], images: Mapping[str, PlotImage]) -> str:
    figures = {name: image for name, image in images.items() if name.partition("/")[2] == label}
    heatmap = figures.pop(f"heatmap/{label}")
    others = "".join(html_figure(label, image) for name, image in figures.items())
    head = f"<h2>{escape(label + of_seeds(trials))}</h2>\n"
    return f"<section>\n{head}{html_figure(label, heatmap)}{_numbers(trials)}{others}</section>\n"


def _numbers(trials: Sequence[Trial]) -> str:
    """Return a method's tables in a collapsed element."""
    per_seed = [trial.matrix for trial in trials]
    matrix = mean_matrix(per_seed)
    stages = len(matrix.labelled_rows())
    count = 0 if matrix.bound else len(matrix.tasks)
    body = ""
    for position, cells in enumerate(matrix_rows(matrix, marks=row_marks(trials))):
        task = position - (stages - count)
        learned = task if 0 <= task < count else None
        body += _row(cells, highlight=learned is None, learned=learned)
    tables = html_table(["after", *matrix.tasks], body) + html_table(
        ["metric", "percent"], html_rows(metric_rows(per_seed, 2))
    )
    scores, costs = mean_scores(trials), cost_rows(trials)
    tables += (
        html_table(["task", *SCORE_COLUMNS], html_rows(score_rows(matrix.tasks, scores))) if scores else ""
    )
    for header, rows in (
        stage_table(trials),
        route_table(trials),
        (ERROR_COLUMNS, error_rows(trials)),
        (CONFUSION_COLUMNS, confusion_rows(trials)),
        (COST_COLUMNS, costs),
    ):
        tables += html_table(header, html_rows(rows)) if rows else ""
    return f"<details><summary>The numbers</summary>\n{tables}</details>\n"


def html_figure(name: str, image: PlotImage) -> str:
    """Return a plot with its caption; the name distinguishes similar plots for a screen reader."""
    caption = escape(image.caption)
    # As large as it was drawn, smaller on a narrow page, and scrolled where it would be too small to read.
    width = round(_pixel_width(image.png) / DPI * CSS_PIXELS_PER_INCH)
    size = f"width: min(100%, {width}px); min-width: {round(READABLE * width)}px"
    return (
        f'<figure><div class="wide" tabindex="0">'
        f'<img src="{_data_uri(image.png)}" alt="{escape(name)}: {caption}" style="{size}"></div>'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _pixel_width(png: bytes) -> int:
    """Return the width in a PNG's first chunk (PNG specification, 11.2.2)."""
    return int.from_bytes(png[16:20])


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def html_table(header: Sequence[str], body: str) -> str:
    """Return a table; `body` is its rows as HTML."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide" tabindex="0">{table}</div>\n'


def html_rows(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text cells as HTML."""
    return "".join(map(_row, rows))


def _row(cells: Sequence[str], highlight: bool = False, learned: int | None = None) -> str:
    """Return a table row; ``highlight`` shades it, ``learned`` marks the cell of the task just trained."""
    first, *rest = cells
    marked = "".join(
        f'<td class="learned">{escape(cell)}</td>' if column == learned else f"<td>{escape(cell)}</td>"
        for column, cell in enumerate(rest)
    )
    return f'<tr{" class=own" if highlight else ""}><th scope="row">{escape(first)}</th>{marked}</tr>'


def _settings(settings: Mapping) -> str:
    if not settings:
        return ""
    items = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(_as_text(value))}</dd>" for key, value in settings.items()
    )
    return f"<section>\n<h2>Settings</h2>\n<dl>{items}</dl>\n</section>\n"


def _as_text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
