"""The accuracy matrices of a run's methods as one object, for programs and notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from llava_keeplora.report.heatmap import colour_limits, draw_heatmap
from llava_keeplora.report.html import html_rows, html_table
from llava_keeplora.report.run_report import ZERO_SHOT, read_results
from llava_keeplora.report.tables import matrix_rows
from llava_keeplora_eval import Matrix

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


class RunMatrix(Mapping[str, Matrix]):
    """The scores of a run in percent: label of a method → its accuracy matrix, `zero-shot` first.

    In a notebook it is shown as a table per method.

    Args:
        matrices: label → matrix.
    """

    def __init__(self, matrices: Mapping[str, Matrix]):
        self._matrices = dict(matrices)

    @classmethod
    def read(cls, run: str | Path) -> RunMatrix:
        """Read the scores that a run has so far.

        Raises:
            RunError: the folder is no run, has no score yet, or a file was damaged.
        """
        return cls(read_results(Path(run)))

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
        return "\n".join(f"{label}\n{matrix.markdown()}" for label, matrix in self.methods.items())

    def _repr_html_(self) -> str:
        return "".join(
            f"<h4>{escape(label)}</h4>\n{html_table(['after', *m.tasks], html_rows(matrix_rows(m)))}"
            for label, m in self.methods.items()
        )
