"""Published figures, the measured ones, and the verdict on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_keeplora.config import ExpectedConfig
from llava_keeplora.files import write_json
from llava_keeplora_eval import Matrix
from llava_keeplora_eval.matrix import format_number

#: Far below a digit that is published or measured.
ROUNDING = 1e-9
REPRODUCED, NOT_REPRODUCED, NOT_COMPARABLE = VERDICTS = ("reproduced", "not reproduced", "not comparable")


@dataclass(frozen=True)
class Figure:
    """A published figure and the measured one.

    Args:
        row: the method's label.
        name: the aggregate, or the task whose last score it is.
        published: the published figure in percent.
        measured: the measured figure in percent; None if the run does not have it.
        tolerance: the largest accepted difference in percentage points.
        reasons: why the two cannot be compared, each a clause; empty if they can.
    """

    row: str
    name: str
    published: float
    measured: float | None
    tolerance: float
    reasons: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        """The measured figure minus the published one, in percentage points."""
        return None if self.measured is None else self.measured - self.published

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`; a figure that the run does not have is not comparable."""
        if self.reasons or self.difference is None:
            return NOT_COMPARABLE
        # Figures are published in decimals, whose difference floats round.
        return REPRODUCED if abs(self.difference) <= self.tolerance + ROUNDING else NOT_REPRODUCED

    @property
    def cells(self) -> list[str]:
        """The published figure, the measured one, their difference and the tolerance.

        Each with as many digits as the published figure and the tolerance have, and at least one.
        """
        digits = max(
            1, *(len(f"{n:.6f}".rstrip("0").partition(".")[2]) for n in (self.published, self.tolerance))
        )
        numbers = (self.published, self.measured, self.difference, self.tolerance)
        return [format_number(number, digits) for number in numbers]

    def __str__(self) -> str:
        published, measured, _, tolerance = self.cells
        return f"{self.row}, {self.name}: {measured} instead of {published} ± {tolerance}"


def compare(
    results: Mapping[str, Matrix],
    expected: Mapping[str, ExpectedConfig],
    reasons: Mapping[str, Sequence[str]] | None = None,
) -> list[Figure]:
    """Return every published figure with the measured one.

    Args:
        results: label → matrix, as returned by a run.
        expected: label → published figures; see `ExpectedConfig`.
        reasons: label → why its figures are not comparable; see `differences`.

    Raises:
        EvalError: if the last score of a task is expected that the run does not have, and nothing says why.
    """
    figures = []
    for label, published in expected.items():
        why = tuple((reasons or {}).get(label, ()))
        measured = _measured(results[label], published, why) if label in results else {}
        for name, value in published.published():
            own = (*why, *filter(None, [published.not_comparable_figures.get(name)]))
            missing = () if own or measured.get(name) is not None else ("the run has no such figure",)
            tolerance = published.tolerances.get(name, published.tolerance)
            figures.append(Figure(label, name, value, measured.get(name), tolerance, own or missing))
    return figures


def _measured(matrix: Matrix, published: ExpectedConfig, why: Sequence[str]) -> dict[str, float | None]:
    """Return aggregate or task → the run's figure, of those that were published."""
    matrix = matrix.or_constant()
    metrics, last = matrix.metrics(), matrix.per_task()["last"]
    tasks = [task for task in published.last if task in matrix.tasks or not why]
    return {name: metrics[name] for name in published.figures} | {
        task: last[matrix.index(task)] for task in tasks
    }


def count_verdicts(figures: Sequence[Figure]) -> dict[str, int]:
    """Return verdict → number of figures, for all `VERDICTS`."""
    return {verdict: sum(figure.verdict == verdict for figure in figures) for verdict in VERDICTS}


def comparison(figures: Sequence[Figure], expected: Mapping[str, ExpectedConfig]) -> str:
    """Return the comparison as a Markdown table, with the rows' sources, tolerances and reasons."""
    if not figures:
        return "no figures are published for these methods, so there is nothing to compare with\n"
    rows = [
        ["row", "figure", "published", "measured", "difference", "tolerance", "verdict"],
        ["---", "---", "---:", "---:", "---:", "---:", "---"],
    ]
    for f in figures:
        rows.append([f.row, f.name, *f.cells, f.verdict])
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    notes = "".join(f"{label}: {_note(figures, label, row)}\n" for label, row in expected.items())
    total = ", ".join(f"{count} {verdict}" for verdict, count in count_verdicts(figures).items())
    return f"{table}\n{notes}\n{total}\n"


def _note(figures: Sequence[Figure], label: str, row: ExpectedConfig) -> str:
    """Return a row's source, where its tolerance comes from, and why its figures are not comparable."""
    reasons = dict.fromkeys(reason for f in figures if f.row == label for reason in f.reasons)
    return "; ".join(
        [
            row.source,
            *([f"tolerance: {row.tolerance_from}"] if row.tolerance_from else []),
            *([f"{NOT_COMPARABLE}: {', and '.join(reasons)}"] if reasons else []),
        ]
    )


def write_comparison(
    path: Path, config: str, figures: Sequence[Figure], expected: Mapping[str, ExpectedConfig]
) -> None:
    """Write the comparison as JSON: the number of each verdict, and every figure with its source and reasons.

    Args:
        path: the file.
        config: the configuration that was compared, by name or file.
        figures: from `compare`.
        expected: label → published figures.
    """

    def record(f: Figure) -> dict[str, Any]:
        return {
            "row": f.row,
            "figure": f.name,
            "published": f.published,
            "measured": f.measured,
            "difference": f.difference,
            "tolerance": f.tolerance,
            "tolerance_from": expected[f.row].tolerance_from,
            "source": expected[f.row].source,
            "verdict": f.verdict,
            "reasons": list(f.reasons),
        }

    write_json(
        path, {"config": config, "verdicts": count_verdicts(figures), "figures": [record(f) for f in figures]}
    )
