"""Tables of tiny runs, in this process unless a test says otherwise."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from llava_keeplora.compare import jobs, parse_table, writers
from llava_keeplora.config import parse_config
from llava_keeplora.errors import UserError
from llava_keeplora.sequence import runner


@contextmanager
def in_this_process() -> Iterator[list]:
    """Runs start one after another here, without plots; gives the jobs that were started."""
    started: list[jobs.Job] = []

    def start(job: jobs.Job, slot: int, workers: int) -> SimpleNamespace:
        started.append(job)
        gc.freeze()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            runner.run(parse_config(job.tree))
            code = 0
        except UserError as error:
            job.log.write_text(f"error: {error}\n")
            code = 2
        return SimpleNamespace(poll=lambda: code, terminate=lambda: None, wait=lambda: code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "start", start)
        patch.setattr(jobs, "PAUSE", 0)
        patch.setattr(runner, "write_run_report", lambda root: None)
        patch.setattr(writers, "write_report", lambda *args: None)
        yield started


@pytest.fixture(scope="session")
def here():
    """Function () → the context in which runs start in this process; see `in_this_process`."""
    return in_this_process


@pytest.fixture
def started():
    """The jobs that a test's tables start."""
    with in_this_process() as found:
        yield found


@pytest.fixture(scope="session")
def make_table(run_tree, tiny_tasks):
    """Function (output_dir, **changes) → a table of the tiny run: two methods, one order of two tasks, seed 0."""

    def build(output_dir, **changes):
        tree = run_tree(output_dir, **{"tasks": [str(path) for path in tiny_tasks[:2]], **changes})
        return parse_table(tree)

    return build


@pytest.fixture(scope="session")
def orders(tiny_tasks):
    """Both orders of two tasks, two seeds and one."""
    names = [str(path) for path in tiny_tasks[:2]]
    return {"I": {"tasks": names, "seeds": [0, 1]}, "II": {"tasks": names[::-1], "seeds": [0]}}


#: Two settings for each method; a learning rate of nothing learns nothing.
TUNING = {
    "seed": 5,
    "order": "I",
    "holdout": 0.5,
    "metric": "transfer+last",
    "settings": {
        "seq-lora": [
            {"training": {"learning_rate": 1e-9}},
            {"training": {"learning_rate": 0.02}, "parts": {"vision": {"rank": 1, "alpha": 1}}},
        ],
        "keeplora": [{"training": {"learning_rate": 0.01}}, {"form": "literal"}],
    },
}


@pytest.fixture(scope="session")
def tuning():
    """How the tuned table is tuned."""
    return TUNING


@pytest.fixture(scope="session")
def tuned(make_table, orders, tmp_path_factory):
    """A finished table with tuning and two orders: (table, outcome, jobs in the order of their start); shared, so copy it before changing it."""
    from llava_keeplora.compare import compare

    table = make_table(tmp_path_factory.mktemp("tuned") / "table", orders=orders, tuning=TUNING)
    with in_this_process() as started:
        outcome = compare(table)
    return SimpleNamespace(table=table, outcome=outcome, started=started)
