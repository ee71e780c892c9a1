"""The accuracy matrix of a task sequence: its cells, its file, and its tables."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from llava_keeplora_eval import aggregates
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.files import write_atomic
from llava_keeplora_eval.markup import markdown_text
from llava_keeplora_recipes.errors import nearest

FORMAT = 1
ZERO_SHOT = "zero-shot"
NOT_AVAILABLE = "n/a"
MISSING = "-"
LARGEST = 1e9


@dataclass
class Matrix:
    """Scores in percent of every task (column) before the run and after each training stage (row).

    Missing rows and cells are filled with ``None``, so that ``rows`` is always T x T and a run in
    progress can be written, shown and continued.

    Args:
        tasks: T unique names, in training order.
        zero_shot: the T scores of the untouched model, or None when it was never measured.
        rows: up to T rows of up to T scores; row t is after training task t, column i is task i.

    Raises:
        EvalError: no task or a repeated one, a row too many or too long, a score that is not a finite number.
    """

    tasks: list[str]
    zero_shot: list[float | None] | None = None
    rows: list[list[float | None]] = field(default_factory=list)

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
        """The 0-based column of a task given by name or by column.

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
            after: the stage: the last trained task by name or column, or None for the zero-shot row.
            task: the scored task by name or column.
            value: the score in percent.

        Raises:
            EvalError: no such task, or a value that is not a finite number.
        """
        column = self.index(task)
        value = _score(value, f"task '{self.tasks[column]}'")
        if after is None:
            if self.zero_shot is None:
                self.zero_shot = [None] * len(self.tasks)
            self.zero_shot[column] = value
        else:
            self.rows[self.index(after)][column] = value

    @property
    def complete(self) -> bool:
        """Whether every cell of the T x T rows is there (the zero-shot row doesn't count)."""
        return all(value is not None for row in self.rows for value in row)

    @property
    def started(self) -> bool:
        """Whether any cell of the T x T rows is there (the zero-shot row doesn't count)."""
        return any(value is not None for row in self.rows for value in row)

    def metrics(self) -> dict[str, float | None]:
        """Every aggregate, unrounded, in percent; see ``aggregates`` for formulas and sources.

        A value is None where the number is undefined (Transfer of one task) or needs a cell that is not
        there yet; ask the function in ``aggregates`` itself to learn which cell. ``zero_shot_transfer`` and
        ``zero_shot_average`` are those of a constant matrix of the zero-shot row: what a model that never
        changes would get; the zero-shot row enters no other number.
        """
        values = {name: _or_none(function, self.rows) for name, function in aggregates.AGGREGATES.items()}
        constant = None if self.zero_shot is None else [self.zero_shot] * len(self.tasks)
        for name in ("transfer", "average"):
            function = aggregates.AGGREGATES[name]
            values[f"zero_shot_{name}"] = None if constant is None else _or_none(function, constant)
        return values

    def per_task(self) -> dict[str, list[float | None]]:
        """Transfer_i, Average_i and Last_i of every task, unrounded.

        None where undefined or not there yet.
        """
        functions = {
            "transfer": aggregates.transfer_of,
            "average": aggregates.average_of,
            "last": aggregates.last_of,
        }
        return {
            name: [_or_none(function, self.rows, i) for i in range(len(self.tasks))]
            for name, function in functions.items()
        }

    def constant_zero_shot(self) -> Matrix | None:
        """The matrix of a model that never changes: the zero-shot row T times; None without such a row."""
        if self.zero_shot is None:
            return None
        return Matrix(self.tasks, self.zero_shot, [self.zero_shot] * len(self.tasks))

    def labelled_rows(self) -> list[tuple[str, list[float | None]]]:
        """(name, cells) of every row, the zero-shot row first when there is one."""
        first = [] if self.zero_shot is None else [(ZERO_SHOT, self.zero_shot)]
        return first + list(zip(self.tasks, self.rows))

    def markdown(self, precision: int = 1) -> str:
        """A Markdown table: zero-shot row, one row per stage, then Transfer, Average and Last per task.

        Args:
            precision: decimals shown; means are taken before rounding. A cell not measured is ``-``; a
                number that is undefined or not there yet is ``n/a``.
        """
        lines = [
            _line(["after", *map(markdown_text, self.tasks), "mean"]),
            _line(["---"] + ["---:"] * (len(self.tasks) + 1)),
        ]
        for name, row in self.labelled_rows():
            known = None not in row
            mean = math.fsum(row) / len(row) if known else None
            lines.append(
                _line(
                    [
                        markdown_text(name),
                        *(shown(v, precision, MISSING) for v in row),
                        shown(mean, precision),
                    ]
                )
            )
        metrics = self.metrics()
        for name, values in self.per_task().items():
            lines.append(
                _line([f"**{name.capitalize()}**", *(shown(v, precision) for v in (*values, metrics[name]))])
            )
        return "\n".join(lines) + "\n"

    def metrics_markdown(self, precision: int = 1) -> str:
        """A two-column Markdown table of ``metrics()``, ``n/a`` where there is no value."""
        lines = [_line(["metric", "percent"]), _line(["---", "---:"])]
        lines += [_line([name, shown(value, precision)]) for name, value in self.metrics().items()]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Comma-separated unrounded cells, header ``after,<tasks>``.

        An empty field is a cell not measured.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["after", *self.tasks])
        for name, row in self.labelled_rows():
            writer.writerow([name, *("" if value is None else repr(value) for value in row)])
        return text.getvalue()

    def to_dict(self) -> dict:
        """The matrix as plain JSON values, with its metrics for readers that don't compute them."""
        return {
            "format": FORMAT,
            "unit": "percent",
            "tasks": self.tasks,
            "zero_shot": self.zero_shot,
            "rows": self.rows,
            "metrics": self.metrics(),
        }

    def to_json(self, path: str | Path) -> None:
        """Write the matrix, unrounded, so that a reader never sees half a file.

        Args:
            path: the file; its folder must exist.

        Raises:
            OSError: the folder is missing, or the disk refuses.
        """
        write_atomic(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Matrix:
        """Read what ``to_json`` wrote.

        Raises:
            EvalError: the file is missing, is not a matrix, or is of another format.
        """
        path = Path(path)
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
        return cls(record["tasks"], record["zero_shot"], record["rows"])


def shown(value: float | None, precision: int = 1, absent: str = NOT_AVAILABLE) -> str:
    """A number as tables show it: rounded once, or ``absent`` for None."""
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
    if abs(number) > LARGEST:  # Sums of a few larger ones are no numbers any more.
        raise EvalError(
            f"{where} has the score {value!r}, and no metric gives more than {LARGEST:g}",
            "give percents, or None",
        )
    return number


def _or_none(function, *arguments) -> float | None:
    try:
        return function(*arguments)
    except EvalError:  # a cell is not there yet; `metrics` documents this None
        return None
