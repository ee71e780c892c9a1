"""The accuracy matrix of a task sequence: its cells, its file, and its tables."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llava_keeplora_eval import aggregates
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.files import write_atomic
from llava_keeplora_eval.markup import markdown_text
from llava_keeplora_recipes.errors import nearest

FORMAT = 1
ZERO_SHOT = "zero-shot"
#: Name of the only row of a bound.
BOUND = "bound"
#: Aggregates of the last row alone, which a bound has too.
LAST_ROW = ("last", "mfn")
NOT_AVAILABLE = "n/a"
MISSING = "-"
#: Largest score in percent; sums of a few larger ones would not be finite.
LARGEST = 1e9


@dataclass
class Matrix:
    """Scores in percent of every task (column) before the run and after each training stage (row).

    Missing rows and cells are filled with ``None``, so that ``rows`` is always T x T, also for a run in
    progress.

    Args:
        tasks: T unique names, in training order.
        zero_shot: the T scores of the base model, or None if they were not measured.
        rows: up to T rows of up to T scores; row t is after training task t, column i is task i.
        of_bound: whether the scores are known to be a bound's; those of one task do not show it.

    Raises:
        EvalError: there is no task or a repeated one, too many rows or cells, or a score that is not finite.
    """

    tasks: list[str]
    zero_shot: list[float | None] | None = None
    rows: list[list[float | None]] = field(default_factory=list)
    of_bound: bool = False

    def __post_init__(self) -> None:
        self.tasks = list(self.tasks)
        count = len(self.tasks)
        if (
            count == 0
            or not all(isinstance(task, str) for task in self.tasks)
            or len(set(self.tasks)) != count
        ):
            raise EvalError(
                f"a matrix needs at least one task and unique names, got {self.tasks}",
                "name every task of the sequence once",
            )
        if len(self.rows) > count:
            raise EvalError(
                f"a matrix of {count} tasks has {len(self.rows)} rows",
                "give one row per trained task at most",
            )
        if self.zero_shot is not None:
            self.zero_shot = self._row(self.zero_shot, ZERO_SHOT)
        rows = [self._row(row, f"after {self.tasks[t]}") for t, row in enumerate(self.rows)]
        self.rows = rows + [[None] * count for _ in range(count - len(rows))]

    def _row(self, row, name: str) -> list[float | None]:
        row = list(row)
        if len(row) > len(self.tasks):
            raise EvalError(
                f"row '{name}' has {len(row)} cells for {len(self.tasks)} tasks",
                "give one score per task at most",
            )
        cells = [None if value is None else _score(value, f"row '{name}'") for value in row]
        return cells + [None] * (len(self.tasks) - len(cells))

    def index(self, task: int | str) -> int:
        """Return the 0-based column of a task given by name or by column.

        Raises:
            EvalError: there is no such task.
        """
        if isinstance(task, str):
            if task not in self.tasks:
                raise EvalError(f"the matrix has no task '{task}'", nearest(task, self.tasks))
            return self.tasks.index(task)
        if not 0 <= task < len(self.tasks):
            raise EvalError(
                f"the matrix has no task number {task}",
                f"count from 0 to {len(self.tasks) - 1}, in training order",
            )
        return task

    def set_cell(self, after: int | str | None, task: int | str, value: float) -> None:
        """Set one score.

        Args:
            after: the last trained task by name or column, or None for the zero-shot row. All of a bound's
                scores (`of_bound`) are in its one row, the last, whatever the task.
            task: the scored task by name or column.
            value: the score in percent.

        Raises:
            EvalError: there is no such task, or the value is not a finite number.
        """
        column = self.index(task)
        value = _score(value, f"task '{self.tasks[column]}'")
        if after is None:
            if self.zero_shot is None:
                self.zero_shot = [None] * len(self.tasks)
            self.zero_shot[column] = value
        else:
            self.rows[-1 if self.of_bound else self.index(after)][column] = value

    def scores_after(self, task: int | str) -> list[float | None]:
        """Return the row of scores after a task, by name or by column; of a bound, its one row, the last.

        Raises:
            EvalError: there is no such task.
        """
        return self.rows[-1 if self.bound else self.index(task)]

    @property
    def complete(self) -> bool:
        """Whether every cell of the T x T rows has a score (the zero-shot row doesn't count)."""
        return all(value is not None for row in self.rows for value in row)

    @property
    def started(self) -> bool:
        """Whether any cell of the T x T rows has a score (the zero-shot row doesn't count)."""
        return any(value is not None for row in self.rows for value in row)

    @property
    def bound(self) -> bool:
        """Whether the last row is the only one with scores, as of a bound: models that learn in no order."""
        *earlier, last = self.rows
        alone = all(value is None for row in earlier for value in row)
        return (bool(earlier) or self.of_bound) and any(value is not None for value in last) and alone

    def metrics(self) -> dict[str, float | None]:
        """Return every aggregate, unrounded, in percent; see ``aggregates`` for formulas and sources.

        A value is None if it is undefined (Transfer of one task) or needs a cell without a score; the error
        of the function in ``aggregates`` names the cell. A bound has those of the last row alone, also where
        it is the only one. ``zero_shot_transfer`` and ``zero_shot_average`` are
        those of a model that never changes; no other value depends on the zero-shot row.
        """
        values = {
            name: _or_none(function, self.rows) if self._defined(name) else None
            for name, function in aggregates.AGGREGATES.items()
        }
        constant = None if self.zero_shot is None else [self.zero_shot] * len(self.tasks)
        for name in ("transfer", "average"):
            function = aggregates.AGGREGATES[name]
            values[f"zero_shot_{name}"] = None if constant is None else _or_none(function, constant)
        return values

    def per_task(self) -> dict[str, list[float | None]]:
        """Return Transfer_i, Average_i and Last_i of every task, unrounded; None as in ``metrics``."""
        functions = {
            "transfer": aggregates.transfer_of,
            "average": aggregates.average_of,
            "last": aggregates.last_of,
        }
        return {
            name: [
                _or_none(function, self.rows, i) if self._defined(name) else None
                for i in range(len(self.tasks))
            ]
            for name, function in functions.items()
        }

    def _defined(self, name: str) -> bool:
        """Return whether an aggregate is one of these scores: of a bound, only of its last row."""
        return not self.bound or name in LAST_ROW

    def constant_zero_shot(self) -> Matrix | None:
        """Return the matrix of a model that never changes: the zero-shot row T times, or None without it."""
        if self.zero_shot is None:
            return None
        return Matrix(self.tasks, self.zero_shot, [self.zero_shot] * len(self.tasks))

    def or_constant(self) -> Matrix:
        """Return the matrix itself, or `constant_zero_shot` if the model was only scored untouched."""
        return self if self.started else self.constant_zero_shot() or self

    def labelled_rows(self) -> list[tuple[str, list[float | None]]]:
        """Return (name, cells) of every row, the zero-shot row first if measured; a bound has one more."""
        first = [] if self.zero_shot is None else [(ZERO_SHOT, self.zero_shot)]
        return first + ([(BOUND, self.rows[-1])] if self.bound else list(zip(self.tasks, self.rows)))

    def markdown(self, precision: int = 1, marks: Mapping[str, str] = {}) -> str:
        """Return a Markdown table: zero-shot row, a row per stage, then Transfer, Average and Last per task.

        A cell without a score is ``-``; an undefined number, or one that needs such a cell, is ``n/a``.

        Args:
            precision: number of decimals; means are taken before rounding.
            marks: task → what is said of the row after it, in parentheses.
        """
        lines = [
            _line(["after", *map(markdown_text, self.tasks), "mean"]),
            _line(["---"] + ["---:"] * (len(self.tasks) + 1)),
        ]
        for name, row in self.labelled_rows():
            mean = None if None in row else math.fsum(row) / len(row)
            lines.append(
                _line(
                    [
                        markdown_text(marked(name, marks)),
                        *(format_number(v, precision, MISSING) for v in row),
                        format_number(mean, precision),
                    ]
                )
            )
        metrics = self.metrics()
        for name, values in self.per_task().items():
            lines.append(
                _line(
                    [
                        f"**{name.capitalize()}**",
                        *(format_number(v, precision) for v in (*values, metrics[name])),
                    ]
                )
            )
        return "\n".join(lines) + "\n"

    def metrics_markdown(self, precision: int = 1) -> str:
        """Return a two-column Markdown table of ``metrics()``, with ``n/a`` for None."""
        lines = [_line(["metric", "percent"]), _line(["---", "---:"])]
        lines += [_line([name, format_number(value, precision)]) for name, value in self.metrics().items()]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Return the unrounded cells as CSV with the header ``after,<tasks>``; empty fields have no score."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["after", *self.tasks])
        for name, row in self.labelled_rows():
            writer.writerow([name, *("" if value is None else repr(value) for value in row)])
        return text.getvalue()

    def to_dict(self) -> dict:
        """Return the matrix as plain JSON values, with its metrics for readers that don't compute them."""
        return {
            "format": FORMAT,
            "unit": "percent",
            "tasks": self.tasks,
            "zero_shot": self.zero_shot,
            "rows": self.rows,
            "metrics": self.metrics(),
            **({"bound": True} if self.of_bound else {}),
        }

    def to_json(self, path: str | Path) -> None:
        """Write the matrix, unrounded, in one atomic step.

        Args:
            path: the file; its folder must exist.

        Raises:
            OSError: the folder is missing or cannot be written to.
        """
        write_atomic(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Matrix:
        """Load a matrix that ``to_json`` wrote.

        Raises:
            EvalError: the file is missing, is not a matrix, or has another format version.
        """
        path = Path(path)
        if path.is_fifo():
            raise EvalError(f"{path} is a pipe, and a matrix is a file", "give the matrix.json of a run")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise EvalError(
                f"there is no matrix file {path}", "check the path, or run the sequence first"
            ) from error
        except (ValueError, OSError, RecursionError) as error:
            raise EvalError(
                f"{path} is not a readable matrix file ({error})",
                "delete it and evaluate again to write it anew",
            ) from error
        if not isinstance(record, dict) or not {"format", "tasks", "zero_shot", "rows"} <= record.keys():
            raise EvalError(
                f"{path} is not a matrix file: it lacks the keys format, tasks, zero_shot and rows",
                "give the matrix.json of a run",
            )
        lists = (
            record["tasks"],
            [] if record["zero_shot"] is None else record["zero_shot"],
            record["rows"],
            *(record["rows"] if isinstance(record["rows"], list) else ()),
        )
        if not all(isinstance(value, list) for value in lists):
            raise EvalError(
                f"{path} is not a matrix file: its tasks or rows are no lists",
                "delete it and evaluate again to write it anew",
            )
        if record["format"] != FORMAT:
            raise EvalError(
                f"{path} has matrix format {record['format']!r}, and this version reads format {FORMAT}",
                "use the version of the package that wrote it",
            )
        return cls(record["tasks"], record["zero_shot"], record["rows"], record.get("bound") is True)


def marked(name: str, marks: Mapping[str, str]) -> str:
    """Return a row's name with what is said of it in parentheses, if anything is."""
    return f"{name} ({marks[name]})" if name in marks else name


def format_number(value: float | None, precision: int = 1, absent: str = NOT_AVAILABLE) -> str:
    """Format a number for a table; ``absent`` for None."""
    if value is None:
        return absent
    text = f"{value:.{precision}f}"
    return text.lstrip("-") if float(text) == 0 else text  # no -0.0


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _score(value, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise EvalError(
            f"{where} has the score {value!r}, which is not a finite number", "give percents, or None"
        )
    if abs(number) > LARGEST:
        raise EvalError(
            f"{where} has the score {value!r}, and no metric gives more than {LARGEST:g}",
            "give percents, or None",
        )
    return number


def _or_none(function, *arguments) -> float | None:
    try:
        return function(*arguments)
    except EvalError:  # A cell has no score yet; `metrics` documents this None.
        return None
