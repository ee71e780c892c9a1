"""The accuracy matrices of a run's methods as one object, for programs and notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from llava_keeplora.guard.verdicts import read_marks
from llava_keeplora.report.heatmap import colour_limits, draw_heatmap
from llava_keeplora.report.html import html_rows, html_table
from llava_keeplora.report.results import Trial
from llava_keeplora.report.run_report import ZERO_SHOT, read_results
from llava_keeplora.report.tables import markdown_table, matrix_rows
from llava_keeplora.report.watched import read_watched, stage_table
from llava_keeplora_eval import Matrix

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


class RunMatrix(Mapping[str, Matrix]):
    """The scores of a run in percent: label of a method → its accuracy matrix, `zero-shot` first.

    In a notebook it is shown as a table per method.

    Args:
        matrices: label → matrix.
        watched: label → stage (`zero-shot`, then each task) → recipe that the guard watches → percent.
        marks: label → task → what is said of the row after it, such as that the guard rolled it back.
    """

    def __init__(
        self,
        matrices: Mapping[str, Matrix],
        watched: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
        marks: Mapping[str, Mapping[str, str]] | None = None,
    ):
        self._matrices = dict(matrices)
        self.watched = {label: (watched or {}).get(label, {}) for label in self}
        self.marks = {label: (marks or {}).get(label, {}) for label in self}

    @classmethod
    def of(cls, run: Path, matrices: Mapping[str, Matrix]) -> RunMatrix:
        """Return matrices with what the verdicts in the folder say of them."""
        folders = {label: (run / label, matrix.tasks) for label, matrix in matrices.items()}
        return cls(
            matrices,
            {label: read_watched(*folder) for label, folder in folders.items()},
            {label: read_marks(*folder) for label, folder in folders.items()},
        )

    @classmethod
    def read(cls, run: str | Path) -> RunMatrix:
        """Read the scores that a run has so far.

        Raises:
            RunError: the folder is no run, has no score yet, or a file was damaged.
        """
        return cls.of(Path(run), read_results(Path(run)))

    def __getitem__(self, label: str) -> Matrix:
        return self._matrices[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)

    @property
    def methods(self) -> dict[str, Matrix]:
        """The matrices of methods that learn; that of `zero-shot` where there is no other yet."""
        learning = {label: matrix for label, matrix in self.items() if label != ZERO_SHOT}
        return learning or self._matrices

    def to_pandas(self) -> pandas.DataFrame:
        """Return the scores as a frame with the index (method, after) and a column per task.

        The row `zero-shot` of a method holds the scores of the untouched model; a missing score is NaN.
        """
        import pandas  # takes most of a second, and reports don't need it

        rows = {
            (label, after): cells
            for label, matrix in self.methods.items()
            for after, cells in matrix.labelled_rows()
        }
        index = pandas.MultiIndex.from_tuples(rows, names=["method", "after"])
        tasks = next(iter(self.values())).tasks
        return pandas.DataFrame(list(rows.values()), index=index, columns=tasks, dtype=float)

    def metrics(self) -> pandas.DataFrame:
        """Return Transfer, Average, Last and the other aggregates as a frame with a row per method."""
        import pandas

        return pandas.DataFrame({label: m.metrics() for label, m in self.methods.items()}, dtype=float).T

    def plot(self, label: str | None = None) -> Figure:
        """Draw the heat map of one method's matrix.

        Args:
            label: the method's; the last one's when None.
        """
        label = label or list(self.methods)[-1]
        return draw_heatmap(self[label], label, limits=colour_limits(self.values()))

    def __repr__(self) -> str:
        parts = []
        for label, matrix in self.methods.items():
            header, rows = self._watched_table(label)
            parts.append(f"{label}\n{matrix.markdown(marks=self.marks[label])}")
            parts += [markdown_table(header, rows)] if rows else []
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        text = ""
        for label, matrix in self.methods.items():
            header, rows = self._watched_table(label)
            scores = html_rows(matrix_rows(matrix, marks=self.marks[label]))
            text += f"<h4>{escape(label)}</h4>\n{html_table(['after', *matrix.tasks], scores)}"
            text += html_table(header, html_rows(rows)) if rows else ""
        return text

    def _watched_table(self, label: str) -> tuple[list[str], list[list[str]]]:
        return stage_table([Trial(self[label], watched=self.watched[label])])
