"""The report's tables as LaTeX, to include in a paper, and as CSV and JSON, to compute with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from llava_keeplora.report.resources import (
    NEEDS_COLUMNS,
    NUMBER_COLUMNS,
    needs_numbers,
    needs_rows,
    passes_by_kind,
)
from llava_keeplora.report.results import Results, deviation, matrices, mean, mean_matrix, row_marks
from llava_keeplora.report.tables import (
    bounds_note,
    is_baseline,
    matrix_rows,
    of_seeds,
    summary_header,
    summary_rows,
    zero_shot_constants,
)
from llava_keeplora.report.watched import (
    TITLE,
    stage_table,
    watched_cells,
    watched_header,
    watched_records,
    watched_rows,
)
from llava_keeplora.report.wrong_answers import answer_records
from llava_keeplora_eval.aggregates import AGGREGATES
from llava_keeplora_eval.guard import printable

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "…": r"\ldots{}",
    "×": r"$\times$",
}


def latex_tables(title: str, results: Results, precision: int = 1) -> str:
    """Return the summary, the resources and every matrix as `tabular`s with the booktabs package's rules."""
    parts = [
        f"% {' '.join(title.split())}: scores in percent, mean and sample standard deviation. Needs "
        f"\\usepackage{{booktabs}}."
    ]
    parts.append(latex_table(summary_header(matrices(results)), summary_rows(matrices(results), precision)))
    parts += [f"% {note}"] if (note := bounds_note(results)) else []
    needs = needs_rows(results)
    parts += ["% Resources of the methods.", latex_table(NEEDS_COLUMNS, needs)] if needs else []
    if header := watched_header(results):
        parts += [
            f"% {TITLE}: recipes that the guard watches.",
            latex_table(header, watched_rows(results, precision)),
        ]
    for name, trials in results.items():
        if is_baseline(name, [trial.matrix for trial in trials]):
            continue
        matrix = mean_matrix([trial.matrix for trial in trials])
        parts.append(
            f"% {name}{of_seeds(trials)}: score of each task (column) after each task was learned (row)."
        )
        parts.append(latex_table(["after", *matrix.tasks], matrix_rows(matrix, precision, row_marks(trials))))
        header, rows = stage_table(trials, precision)
        parts += [latex_table(header, rows)] if rows else []
    return "\n".join(parts) + "\n"


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return one `tabular`; the first column is text, the others are numbers."""
    lines = [" & ".join(map(_latex, cells)) + r" \\" for cells in (header, *rows)]
    columns = "l" + "r" * (len(header) - 1)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _latex(text: str) -> str:
    minus = f"$-${text[1:]}" if text[:1] == "-" and text[1:2].isdigit() else None
    return (
        "".join(LATEX.get(sign, sign) for sign in printable(" ".join(text.splitlines())))
        if minus is None
        else minus.replace(" ± ", r" $\pm$ ")
    )


def summary_csv(results: Results) -> str:
    """Return `summary_numbers` as CSV."""
    return csv_table(*summary_numbers(results))


def summary_numbers(results: Results) -> tuple[list[str], list[list]]:
    """Return a header, and one row per run, unrounded.

    The columns are n, mean and sample standard deviation of every aggregate, and the means of the method's
    resources; None where undefined.
    """
    by_name, needs = matrices(results), needs_numbers(results)
    runs = {name: trials for name, trials in by_name.items() if not is_baseline(name, trials)}
    rows = []
    for name, trials in {**zero_shot_constants(by_name), **runs}.items():
        metrics = [matrix.metrics() for matrix in trials]
        cells = [
            number(values[key] for values in metrics) for key in AGGREGATES for number in (mean, deviation)
        ]
        rows.append([name, len(trials), *cells, *needs.get(name, [None] * len(NUMBER_COLUMNS))])
    aggregates = [f"{key}_{number}" for key in AGGREGATES for number in ("mean", "sd")]
    return ["run", "n", *aggregates, *NUMBER_COLUMNS], rows


def summary_records(results: Results) -> dict[str, dict[str, Any]]:
    """Return run → the numbers of `summary_numbers` by their names, and the other passes by kind."""
    header, rows = summary_numbers(results)
    passes = passes_by_kind(results)
    return {
        row[0]: dict(zip(header[1:], row[1:], strict=True)) | {"other_passes_of": passes.get(row[0])}
        for row in rows
    }


def report_json(results: Results) -> str:
    """Return the summary's numbers, and the wrong answers by class per run, seed, task and stage, as JSON.

    With a guard that watches recipes, their scores too.
    """
    content = {"summary": summary_records(results), "answers": answer_records(results)}
    content |= {"watched": watched} if (watched := watched_records(results)) else {}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def scores_csv(results: Results) -> str:
    """Return every cell of every matrix as CSV, unrounded: one row per run, seed, stage and task.

    Cells not measured are left out.
    """
    rows = [
        [name, trial.seed, after, task, value]
        for name, trials in results.items()
        for trial in trials
        for after, row in trial.matrix.labelled_rows()
        for task, value in zip(trial.matrix.tasks, row)
        if value is not None
    ]
    return csv_table(["run", "seed", "after", "task", "score"], rows)


def watched_csv(results: Results) -> str:
    """Return the scores of watched recipes as CSV, in the form of `scores_csv`; empty without any."""
    cells = watched_cells(results)
    return csv_table(["run", "seed", "after", "task", "score"], cells) if cells else ""


def csv_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Return rows as CSV, numbers unrounded."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])  # None becomes an empty field
    return text.getvalue()
