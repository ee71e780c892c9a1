"""Progress of a run: a live view on a terminal, else a log line from time to time."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llava_keeplora_eval import Matrix
from llava_keeplora_eval.matrix import BOUND, ZERO_SHOT, format_number, marked

logger = logging.getLogger(__name__)

#: Seconds between two log lines if there is no terminal.
INTERVAL = 30.0
#: How often the live view is drawn per second; drawing takes time from the run.
REFRESH = 2
BAR_WIDTH = 30


class Progress:
    """Progress of a run, counted in forward passes of one image.

    Args:
        total: the work that is left when the run starts or resumes.
        show: whether this process reports.
    """

    def __init__(self, total: float, show: bool):
        self.total, self.show = max(total, 1.0), show
        self.done = 0.0
        self._until, self._text = 0.0, ""
        self._title, self._matrix = "", None
        self._marks: Mapping[str, str] = {}
        self._start = self._last = time.monotonic()
        self._open = ExitStack()
        self._live: Live | None = None
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> Progress:
        if self.show and self._terminal:
            # Transient: at the end, the tables that a run prints take its place.
            stderr = sys.stderr
            live = self._live = Live(
                console=Console(file=stderr),
                get_renderable=self._view,
                refresh_per_second=REFRESH,
                transient=True,
                redirect_stdout=False,
            )
            self._open.enter_context(live)
            self._open.enter_context(_logging_above(stderr))
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def watch(self, title: str, matrix: Matrix, marks: Mapping[str, str] = {}) -> None:
        """Show this matrix from now on, as it fills; `marks` has what is said of some tasks' rows."""
        self._title, self._matrix, self._marks = title, matrix, marks

    @contextmanager
    def stage(self, text: str, cost: float) -> Iterator[None]:
        """Count a block as work of a known cost.

        What `advance` has not reported by the end is added then; what it reports beyond the cost is ignored.

        Args:
            text: what is done, for the view.
            cost: in forward passes of one image.
        """
        self._until, self._text = self.done + cost, text
        if self._live:
            self._live.refresh()  # A short stage may end before the view is drawn the next time.
        yield
        self.advance(self._until - self.done)

    def extend(self, cost: float) -> None:
        """Count more work than was foreseen; inside a stage it is a part of that stage."""
        self.total += cost
        self._until += cost

    def advance(self, cost: float) -> None:
        """Report work done inside a stage."""
        self.done += min(cost, self._until - self.done)
        if self.show and not self._terminal and time.monotonic() - self._last > INTERVAL:
            self.note(self._text)

    def left(self) -> str:
        """Return as text how much is done and an estimate of the time left."""
        # From the average rate over the run: a recent rate jumps whenever a stage of another kind begins.
        seconds = (time.monotonic() - self._start) * (self.total - self.done) / max(self.done, 1e-9)
        if self.done < 0.01 * self.total:
            return f"{self.done / self.total:.0%} done"
        return f"{self.done / self.total:.0%} done, about {duration(seconds)} left"

    def note(self, text: str) -> None:
        """Log a line, followed by the estimate if there is no live view to show it."""
        self._last = time.monotonic()
        finished = self.done > 0.999 * self.total
        if self.show:
            logger.info("%s", text if self._terminal or finished else f"{text} ({self.left()})")

    def _view(self) -> Group:
        """Return the live view: stage, progress and estimate, and the last matrix."""
        line = Table.grid(padding=(0, 2))
        line.add_row(
            ProgressBar(self.total, self.done, width=BAR_WIDTH, complete_style="green"),
            f"{self.left()}, {duration(time.monotonic() - self._start)} so far",
        )
        parts = [Text(self._text, style="bold"), line]
        if self._matrix is not None:
            parts += [
                Text(f"{self._title}: score in % of each task (column), after each one (row)"),
                matrix_view(self._matrix, self._marks),
            ]
        return Group(*parts)


def matrix_view(matrix: Matrix, marks: Mapping[str, str] = {}) -> Table:
    """Return the filled rows of a matrix as a table, with the score on the task just learned in bold.

    Columns have the tasks' numbers instead of their names, so that many fit.
    """
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("", no_wrap=True)
    for number in range(1, len(matrix.tasks) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    rows = [(ZERO_SHOT, matrix.zero_shot or [])] + [
        (f"{number} {marked(name, marks)}", row)
        for number, (name, row) in enumerate(zip(matrix.tasks, matrix.rows), start=1)
    ]
    if matrix.bound:
        rows[1:] = [(BOUND, matrix.rows[-1])]
    for learned, (name, row) in enumerate(rows):
        table.add_row(
            Text(name),
            *(
                Text(format_number(value, 1, "·"), "bold" if number == learned else "")
                for number, value in enumerate(row, start=1)
            ),
        )
    return table


@contextmanager
def _logging_above(stderr: TextIO) -> Iterator[None]:
    """Print log lines above the live view, which has replaced stderr, instead of through it."""
    handlers = [
        h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler) and h.stream is stderr
    ]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(stderr)


def duration(seconds: float) -> str:
    """Return a duration as text: `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
