"""The tables of a report: one row per run, and each run's matrix."""

from __future__ import annotations

from collections.abc import Mapping

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


def markdown_tables(title: str, results: Mapping[str, Matrix], precision: int = 1) -> str:
    """The summary, then every matrix with its metrics, as one Markdown page."""
    lines = [f"# {title}", "", "| " + " | ".join(["run", *COLUMNS]) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in summary_rows(results, precision)]
    parts = ["\n".join(lines) + "\n"]
    for label, matrix in results.items():
        parts.append(f"## {label}\n\n{matrix.markdown(precision)}\n{matrix.metrics_markdown(precision)}")
    return "\n".join(parts)
