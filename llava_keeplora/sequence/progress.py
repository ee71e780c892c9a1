"""One bar over a whole run with an estimate of what is left; where nobody watches a terminal, a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

#: Seconds between two lines where there is no terminal.
INTERVAL = 30.0


class Progress:
    """Counts work done in images through the model once.

    Args:
        total: the work that is left when the run starts or goes on.
        show: whether this process reports.
    """

    def __init__(self, total: float, show: bool):
        self.total, self.show = max(total, 1.0), show
        self.done = 0.0
        self._until, self._text = 0.0, ""
        self._start = self._last = time.monotonic()
        self._open = ExitStack()
        self._terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None

    def __enter__(self) -> Progress:
        # The average rate over the run: a recent one jumps whenever a stage of another kind begins.
        form = "{percentage:3.0f}%|{bar:20}| {elapsed}, {remaining} left  {desc}"
        self._bar = tqdm(total=self.total, smoothing=0, disable=not (self.show and self._terminal), dynamic_ncols=True, bar_format=form)
        self._open.enter_context(self._bar)
        # Log lines go above the bar instead of through it.
        self._open.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    @contextmanager
    def stage(self, text: str, cost: float) -> Iterator[None]:
        """Work of a known cost: what `advance` doesn't report of it is added at its end, what is too much is not.

        Args:
            text: what is done.
            cost: in images through the model once.
        """
        self._until, self._text = self.done + cost, text
        self._bar.set_description_str(text)
        yield
        self.advance(cost)

    def advance(self, cost: float) -> None:
        """Report work done inside a stage."""
        cost = min(cost, self._until - self.done)
        self.done += cost
        self._bar.update(cost)
        if self.show and not self._terminal and time.monotonic() - self._last > INTERVAL:
            self.note(self._text)

    def left(self) -> str:
        """For a person: how much is done and how long the rest may take."""
        seconds = (time.monotonic() - self._start) * (self.total - self.done) / max(self.done, 1e-9)
        if self.done < 0.01 * self.total:
            return f"{self.done / self.total:.0%} done"
        return f"{self.done / self.total:.0%} done, about {duration(seconds)} left"

    def note(self, text: str) -> None:
        """A line that stays, with the estimate where there is no bar to show it."""
        self._last = time.monotonic()
        finished = self.done > 0.999 * self.total
        if self.show:
            logger.info("%s", text if self._terminal or finished else f"{text} ({self.left()})")


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
