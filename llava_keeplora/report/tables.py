"""Tables of a report, as text cells and as Markdown: one row per run, and each run's matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llava_keeplora.report.cost import COST_COLUMNS, cost_rows
from llava_keeplora.report.resources import NEEDS_COLUMNS, budget_note, needs_rows
from llava_keeplora.report.results import (
    Results,
    Trial,
    is_bound,
    matrices,
    mean_matrix,
    mean_scores,
    row_marks,
    spread,
)
from llava_keeplora.report.routes import route_table
from llava_keeplora.report.watched import NOTE, TITLE, stage_table, watched_header, watched_rows
from llava_keeplora.report.wrong_answers import ERROR_COLUMNS, error_rows
from llava_keeplora_eval.markup import markdown_text
from llava_keeplora_eval.matrix import MISSING, ZERO_SHOT, Matrix, format_number, marked

#: Column title and the name of the number in ``Matrix.metrics``.
COLUMNS = {
    "Transfer": "transfer",
    "Average": "average",
    "Last": "last",
    "Forgetting": "forgetting",
    "BWT": "bwt",
}


def is_baseline(name: str, trials: Sequence[Matrix]) -> bool:
    """Return whether trials are the base model, which has a zero-shot row and no stage."""
    is_zero_shot = name == ZERO_SHOT or name.startswith(f"{ZERO_SHOT} (")
    return is_zero_shot and all(matrix.zero_shot is not None and not matrix.started for matrix in trials)


def bounds_first(results: Results) -> dict[str, Sequence[Trial]]:
    """Return the results with the base model first, then the bounds, then the methods that learn in order."""

    def group(name: str) -> int:
        trials = [trial.matrix for trial in results[name]]
        return 0 if is_baseline(name, trials) else 1 if is_bound(trials) else 2

    return {name: results[name] for name in sorted(results, key=group)}


def bounds_note(results: Results) -> str:
    """Return a sentence that names the bounds among the results; empty for none."""
    trials = {name: [trial.matrix for trial in of_name] for name, of_name in results.items()}
    bounds = [
        name for name, of_name in trials.items() if is_bound(of_name) and not is_baseline(name, of_name)
    ]
    return f"Bounds, learned in no order and with Last alone: {', '.join(bounds)}." if bounds else ""


def summary_header(results: Mapping[str, Sequence[Matrix]]) -> list[str]:
    """Return the columns of `summary_rows`, with the number of seeds `n` where any row has several."""
    return ["run", *(["n"] if _repeated(results) else []), *COLUMNS]


def summary_rows(results: Mapping[str, Sequence[Matrix]], precision: int = 1) -> list[list[str]]:
    """Return the summary as text cells: a zero-shot row, then one row per run, mean ± sample sd over seeds.

    The zero-shot row has the metrics of a model that never changes; a baseline among the results gets no
    other row. Where runs differ in their zero-shot scores, each of these gets a row, named after the first
    run that has it.

    Args:
        results: label -> matrices, one per seed.
        precision: number of decimals.
    """
    runs = {label: trials for label, trials in results.items() if not is_baseline(label, trials)}
    rows = {**zero_shot_constants(results), **runs}
    return [_summary_row(label, trials, precision, _repeated(results)) for label, trials in rows.items()]


def zero_shot_constants(results: Mapping[str, Sequence[Matrix]]) -> dict[str, list[Matrix]]:
    """Return the zero-shot rows, of models that never change, by their names in the summary."""
    constants: list[tuple[str, Matrix]] = []
    for label, trials in results.items():
        for constant in (matrix.constant_zero_shot() for matrix in trials):
            if constant is not None and all(constant != other for _, other in constants):
                constants.append((label, constant))
    # A label that begins with `zero-shot` needs no prefix.
    names = [
        ZERO_SHOT
        if len(constants) == 1
        else label
        if label.startswith(ZERO_SHOT)
        else f"{ZERO_SHOT} ({label})"
        for label, _ in constants
    ]
    return {name: [constant] for name, (_, constant) in zip(names, constants)}


def _repeated(results: Mapping[str, Sequence[Matrix]]) -> bool:
    return any(len(trials) > 1 for trials in results.values())


def _summary_row(label: str, trials: Sequence[Matrix], precision: int, count: bool) -> list[str]:
    metrics = [matrix.metrics() for matrix in trials]
    cells = [spread([values[name] for values in metrics], precision) for name in COLUMNS.values()]
    return [label, *([str(len(trials))] if count else []), *cells]


def metric_rows(trials: Sequence[Matrix], precision: int = 1) -> list[list[str]]:
    """Return every aggregate of a run, mean ± sample standard deviation over its seeds."""
    metrics = [matrix.metrics() for matrix in trials]
    return [[name, spread([values[name] for values in metrics], precision)] for name in metrics[0]]


def matrix_rows(matrix: Matrix, precision: int = 1, marks: Mapping[str, str] = {}) -> list[list[str]]:
    """Return the matrix as text cells: its rows by name, then Transfer, Average and Last of every task.

    Args:
        matrix: the scores.
        precision: number of decimals.
        marks: task → what is said of the row after it, in parentheses.
    """
    rows = [
        [marked(name, marks), *(format_number(value, precision, MISSING) for value in row)]
        for name, row in matrix.labelled_rows()
    ]
    return rows + [
        [name.capitalize(), *(format_number(value, precision) for value in values)]
        for name, values in matrix.per_task().items()
    ]


#: Columns of the table of scores, after the task's name.
SCORE_COLUMNS = (
    "metric",
    "after learning it",
    "at the end",
    "lenient then",
    "lenient now",
    "compliance then",
    "compliance now",
    "n",
    "dropped",
)


def score_rows(
    tasks: Sequence[str], stages: Sequence[Mapping[str, Mapping]], precision: int = 1
) -> list[list[str]]:
    """Return each task's scores just after it was learned and at the end, strict and lenient.

    Where the strict score falls and the lenient one does not, the model still knows the answers but gives
    them in another form.

    Args:
        tasks: names of the tasks, in the order in which they are learned.
        stages: one mapping per stage, the base's first: task → score as
            `llava_keeplora_eval.scoring.Score.to_dict` gives it.
        precision: number of decimals.
    """
    rows = []
    for position, task in enumerate(tasks, start=1):
        # Of a bound, a stage has the scores of some tasks alone.
        having = [stage[task] for stage in stages if task in stage]
        then = next((stage[task] for stage in stages[position:] if task in stage), having[-1])
        now = having[-1]
        shares = [
            format_number(score.get(key), precision)
            for key in ("score", "lenient", "compliance")
            for score in (then, now)
        ]
        rows.append(
            [task, f"{now['metric']} v{now['metric_version']}", *shares, str(now["n"]), str(now["dropped"])]
        )
    return rows


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    first, *lines = ["| " + " | ".join(map(markdown_text, row)) + " |" for row in (header, *rows)]
    return "\n".join([first, "| --- |" + " ---: |" * (len(header) - 1), *lines]) + "\n"


def summary_table(results: Mapping[str, Sequence[Matrix]], precision: int = 1) -> str:
    """Return `summary_rows` as Markdown."""
    return markdown_table(summary_header(results), summary_rows(results, precision))


def markdown_tables(title: str, results: Results, precision: int = 1) -> str:
    """Return the summary, the methods' resources and every matrix as one Markdown page."""
    parts = [f"# {title}\n\n{summary_table(matrices(results), precision)}"]
    needs = needs_rows(results)
    parts += [markdown_table(NEEDS_COLUMNS, needs)] if needs else []
    parts += [f"{note}\n" for note in (bounds_note(results), budget_note(results)) if note]
    if header := watched_header(results):
        parts.append(f"## {TITLE}\n\n{NOTE}\n\n{markdown_table(header, watched_rows(results, precision))}")
    for name, trials in results.items():
        per_seed = [trial.matrix for trial in trials]
        parts.append(
            f"## {name}{of_seeds(trials)}\n\n{mean_matrix(per_seed).markdown(precision, row_marks(trials))}"
        )
        header, rows = stage_table(trials, precision)
        parts += [markdown_table(header, rows)] if rows else []
        parts.append(markdown_table(["metric", "percent"], metric_rows(per_seed, precision)))
        scores = mean_scores(trials)
        parts += (
            [markdown_table(["task", *SCORE_COLUMNS], score_rows(per_seed[0].tasks, scores, precision))]
            if scores
            else []
        )
        header, rows = route_table(trials)
        parts += [markdown_table(header, rows)] if rows else []
        errors = error_rows(trials)
        parts += [markdown_table(ERROR_COLUMNS, errors)] if errors else []
        costs = cost_rows(trials)
        parts += [markdown_table(COST_COLUMNS, costs)] if costs else []
    return "\n".join(parts)


def of_seeds(trials: Sequence[Trial]) -> str:
    """Return the suffix of a name whose numbers are means over seeds; empty for a single trial."""
    return f", mean of {len(trials)} seeds" if len(trials) > 1 else ""
