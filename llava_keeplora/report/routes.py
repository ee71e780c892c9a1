"""What answered each task's test examples at the end, of methods that route them to one of several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_keeplora.report.results import Trial, mean
from llava_keeplora.run_folder import BASE, ROUTES
from llava_keeplora_eval.matrix import format_number


def route_table(trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table of routes after the last task; no rows for methods without them.

    A cell is the share of a task's test examples, in percent, that is answered with what was learned of the
    column's task, or by the untouched base; means over the trials.
    """
    tasks = trials[0].matrix.tasks
    learned = [name for name in tasks[: len(trials[0].scores) - 1] if name in trials[0].learned]
    ends = [trial.scores[-1] if trial.scores else {} for trial in trials]
    rows = []
    for task in tasks:
        if all(ROUTES in end.get(task, {}) for end in ends):
            shares = zip(*(_shares(end[task], learned) for end in ends))
            rows.append([task, *(format_number(mean(cells), 1) for cells in shares)])
    return ["routed to, % at the end", *learned, BASE], rows


def _shares(score: Mapping[str, Any], learned: Sequence[str]) -> list[float]:
    """Return the shares, in percent, of each learned task and of the base in a score's examples."""
    routes = score[ROUTES]
    counts = [*(routes["tasks"].get(name, 0) for name in learned), routes[BASE]]
    return [100.0 * count / score["n"] for count in counts]
