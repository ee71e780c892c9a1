"""Comparison of a run with the published figures that its configuration expects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llava_keeplora.config import ExpectedConfig, RunConfig
from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora_eval import Matrix
from llava_keeplora_eval.matrix import format_number
from llava_keeplora_recipes import load_recipes


@dataclass(frozen=True)
class Figure:
    """A published figure and the measured one.

    Args:
        row: the method's label.
        name: the aggregate, or the task whose last score it is.
        published: the published figure in percent.
        measured: the measured figure in percent; None if the run does not have it.
        tolerance: the largest accepted difference in percentage points.
    """

    row: str
    name: str
    published: float
    measured: float | None
    tolerance: float

    @property
    def met(self) -> bool:
        """Whether the measured figure is within the tolerance."""
        return self.measured is not None and abs(self.measured - self.published) <= self.tolerance

    def __str__(self) -> str:
        measured = format_number(self.measured)
        return f"{self.row}, {self.name}: {measured} instead of {self.published} ± {self.tolerance}"


def check_expected(config: RunConfig) -> None:
    """Check before a run that it will have every expected figure.

    Raises:
        ConfigError: if the last score of a task is expected that is not in the sequence.
    """
    names = [recipe.name for recipe in load_recipes(config.tasks)]
    for label, published in config.expected.items():
        for task in published.last:
            if task not in names:
                raise ConfigError(
                    f"expected.{label}.last names '{task}', which is no task of the run", nearest(task, names)
                )


def compare(results: Mapping[str, Matrix], expected: Mapping[str, ExpectedConfig]) -> list[Figure]:
    """Return every published figure with the measured one.

    Args:
        results: label → matrix, as returned by a run.
        expected: label → published figures; see `ExpectedConfig`.

    Raises:
        EvalError: if the last score of a task is expected that the run does not have.
    """
    figures = []
    for label, published in expected.items():
        # The untouched model's matrix has only a zero-shot row.
        matrix = results[label] if results[label].started else results[label].constant_zero_shot()
        metrics, last = matrix.metrics(), matrix.per_task()["last"]
        figures += [
            Figure(label, name, value, metrics[name], published.tolerance)
            for name, value in published.figures.items()
        ]
        figures += [
            Figure(label, task, value, last[matrix.index(task)], published.tolerance)
            for task, value in published.last.items()
        ]
    return figures


def comparison(figures: list[Figure], expected: Mapping[str, ExpectedConfig]) -> str:
    """Return the comparison as a Markdown table, with the sources of the published figures."""
    if not figures:
        return "no figures are published for these methods, so there is nothing to compare with\n"
    rows = [
        ["row", "figure", "published", "measured", "difference", "tolerance", "met"],
        ["---", "---", "---:", "---:", "---:", "---:", "---"],
    ]
    for f in figures:
        difference = None if f.measured is None else f.measured - f.published
        rows.append(
            [
                f.row,
                f.name,
                format_number(f.published),
                format_number(f.measured),
                format_number(difference),
                format_number(f.tolerance),
                "yes" if f.met else "no",
            ]
        )
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    return table + "\n" + "".join(f"{label}: {published.source}\n" for label, published in expected.items())
