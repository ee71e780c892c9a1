"""The tables of a report: one row per run, and each run's matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llava_keeplora_eval.matrix import ZERO_SHOT, Matrix, shown

#: Column title and the name of the number in ``Matrix.metrics``.
COLUMNS = {
    "Transfer": "transfer",
    "Average": "average",
    "Last": "last",
    "Forgetting": "forgetting",
    "BWT": "bwt",
}


def is_baseline(label: str, matrix: Matrix) -> bool:
    """Whether this is the untouched model itself, which has a zero-shot row and no stage."""
    return label == ZERO_SHOT and matrix.zero_shot is not None and not matrix.started


def summary_rows(results: Mapping[str, Matrix], precision: int = 1) -> list[list[str]]:
    """The summary as text cells: a zero-shot row first, then one row per run.

    The zero-shot row is the constant matrix of a model that never changes; a baseline among the results is
    this row and no other. Runs whose zero-shot scores or
    tasks differ get one such row each, named after the first run that has it.

    Args:
        results: label -> matrix.
        precision: decimals shown.
    """
    constants: list[tuple[str, Matrix]] = []
    for label, matrix in results.items():
        constant = matrix.constant_zero_shot()
        if constant is not None and all(constant != other for _, other in constants):
            constants.append((label, constant))
    alone = len(constants) == 1
    named = [(ZERO_SHOT if alone else f"{ZERO_SHOT} ({label})", matrix) for label, matrix in constants]
    runs = [(label, matrix) for label, matrix in results.items() if not is_baseline(label, matrix)]
    return [_summary_row(label, matrix, precision) for label, matrix in [*named, *runs]]


def _summary_row(label: str, matrix: Matrix, precision: int) -> list[str]:
    metrics = matrix.metrics()
    return [label, *(shown(metrics[name], precision) for name in COLUMNS.values())]


#: What the table of scores shows of each task, beside its name.
SCORE_COLUMNS = ("metric", "after learning it", "at the end", "lenient then", "lenient now", "compliance then", "compliance now", "n", "dropped")


def score_rows(tasks: Sequence[str], stages: Sequence[Mapping[str, Mapping]], precision: int = 1) -> list[list[str]]:
    """Each task's score just after it was learned and at the end, with what style has to do with it.

    Where the score falls and the lenient one does not, the answers are still known and another form of them was learned.

    Args:
        tasks: in the order in which they are learned.
        stages: one mapping per stage, the base's first: task → score as `llava_keeplora_eval.scoring.Score.to_dict` gives it.
        precision: decimals shown.
    """
    rows = []
    for position, task in enumerate(tasks, start=1):
        then, now = stages[min(position, len(stages) - 1)][task], stages[-1][task]
        shares = [shown(score.get(key), precision) for key in ("score", "lenient", "compliance") for score in (then, now)]
        rows.append([task, f"{now['metric']} v{now['metric_version']}", *shares, str(now["n"]), str(now["dropped"])])
    return rows


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]) + "\n"


def summary_table(results: Mapping[str, Matrix], precision: int = 1) -> str:
    """`summary_rows` as Markdown."""
    return markdown_table(["run", *COLUMNS], summary_rows(results, precision))


def markdown_tables(title: str, results: Mapping[str, Matrix], scores: Mapping[str, list[list[str]]], precision: int = 1) -> str:
    """The summary, then every matrix with its metrics and scores, as one Markdown page."""
    parts = [f"# {title}\n\n{summary_table(results, precision)}"]
    for label, matrix in results.items():
        parts.append(f"## {label}\n\n{matrix.markdown(precision)}\n{matrix.metrics_markdown(precision)}")
        if label in scores:
            parts.append(markdown_table(["task", *SCORE_COLUMNS], scores[label]))
    return "\n".join(parts)
