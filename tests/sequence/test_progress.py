"""A terminal gets a live view of stage, progress, estimate and matrix; a pipe gets plain lines."""

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest

from llava_keeplora.sequence import progress
from llava_keeplora.sequence.progress import Progress, matrix_view
from llava_keeplora_eval import Matrix

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A pseudo-terminal as stderr; `text` is everything that was drawn on it, without colours and movements."""

    def __init__(self, rows: int = 30, columns: int = 100):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.stderr = os.fdopen(slave, "w")
        self._pieces: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self.master, 65536)
            except OSError:  # the other end is closed
                return
            self._pieces.append(piece)

    def close(self) -> str:
        self.stderr.close()
        self._reader.join(10)
        os.close(self.master)
        return re.sub(r"\r\n?", "\n", CONTROL.sub("", b"".join(self._pieces).decode()))


@pytest.fixture
def terminal(monkeypatch):
    """Function () → a terminal that stderr and logging now write to; called by the test, as pytest sets stderr between its phases."""
    handlers = []

    def open_one() -> Terminal:
        one = Terminal()
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setattr(sys, "stderr", one.stderr)
        monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
        handlers.append(logging.StreamHandler(one.stderr))
        logging.getLogger().addHandler(handlers[-1])
        return one

    yield open_one
    for handler in handlers:
        logging.getLogger().removeHandler(handler)


@pytest.fixture
def piped(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def test_a_run_on_a_terminal_shows_stage_progress_estimate_and_the_last_matrix(
    run_config, drive, tmp_path, one_label, tiny_tasks, terminal, monkeypatch
):
    monkeypatch.setattr(progress, "REFRESH", 50)
    screen = terminal()
    results = drive(
        run_config(tmp_path / "run", tasks=[str(path) for path in tiny_tasks[:2]], **one_label("seq-lora"))
    )
    text = screen.close()
    assert (
        "seq-lora task 1/2 colours: training" in text
        and "seq-lora task 2/2 stripes: scoring every task" in text
    )
    assert re.search(r"━+ +\d+% done, about \d+ s left, \d+ s so far", text)
    assert "seq-lora: score in % of each task (column), after each one (row)" in text
    first = " +".join(f"{value:.1f}" for value in results["seq-lora"].rows[0])
    assert re.search(rf"1 colours +{first}\n2 stripes +· +·", text)
    note = f"seq-lora task 2/2 stripes: {results['seq-lora'].rows[1][1]:.1f} % on it"
    assert any(line.startswith(note) for line in text.splitlines()), (
        "a line that stays begins on a line of its own, above the view"
    )


def test_the_view_leaves_stderr_and_logging_as_they_were(terminal):
    screen = terminal()
    before = [handler.stream for handler in logging.getLogger().handlers if hasattr(handler, "stream")]
    with Progress(10, show=True):
        assert sys.stderr is not screen.stderr
    assert sys.stderr is screen.stderr
    assert [
        handler.stream for handler in logging.getLogger().handlers if hasattr(handler, "stream")
    ] == before


@pytest.mark.parametrize("change", ["another process", "dumb terminal"])
def test_other_processes_and_dumb_terminals_draw_nothing(terminal, monkeypatch, change):
    screen = terminal()
    if change == "dumb terminal":
        monkeypatch.setenv("TERM", "dumb")
    with Progress(10, show=change == "dumb terminal") as shown, shown.stage("work", 10):
        pass
    assert screen.close() == ""


def test_a_pipe_gets_a_line_with_the_estimate_when_a_while_has_passed(piped, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress(100, show=True) as shown, shown.stage("task 1/2: training", 100):
        for clock[0] in (10.0, 29.0, 40.0):
            shown.advance(20)
    assert [record.getMessage() for record in piped.records] == [
        "task 1/2: training (60% done, about 27 s left)"
    ]


def test_work_that_nobody_foresaw_is_in_the_estimate_and_a_part_of_its_stage(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress(100, show=False) as shown:
        with shown.stage("judging it", 50):
            shown.advance(50)
            shown.extend(100)
            clock[0] = 50.0
            assert shown.left() == "25% done, about 2 min left"  # 150 of 200 are left, at 1 a second.
            shown.advance(70)
            assert shown.done == 120
        assert shown.done == 150
        shown.extend(30)
        with shown.stage("the rest", 80):
            pass
    assert shown.done == shown.total == 230


def test_a_row_that_was_rolled_back_says_so():
    from rich.console import Console

    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    console.print(matrix_view(Matrix(["a", "b"], [1.0, 2.0], [[3.0, 4.0]] * 2), {"b": "rolled back"}))
    assert console.export_text().splitlines()[3].split() == ["2", "b", "(rolled", "back)", "3.0", "4.0"]


def test_eleven_tasks_fit_a_terminal_of_eighty_columns():
    from rich.console import Console

    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    console.print(matrix_view(Matrix([f"dataset-{i}" for i in range(11)], [10.0] * 11, [[99.9] * 11])))
    lines = console.export_text().splitlines()
    assert len(lines) == 1 + 1 + 11 and lines[2].split() == ["1", "dataset-0", *["99.9"] * 11]
