"""A launcher that is killed takes its ranks along; a shell that ends leaves them alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import forked
from llava_keeplora.sequence import launcher as watched


def processes_of(folder):
    """Processes whose command line names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(path.parent.name)] * (str(folder).encode() in path.read_bytes())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_killed_deepspeed_takes_its_ranks_along(config_file, start, launcher, script, tmp_path):
    # Long enough that a rank which nobody stops would still be at work after the interval between two looks.
    longer = "training.num_train_epochs=500"
    process = start(
        [*launcher(1), script], "--config", config_file(), "--output-dir", tmp_path / "run", longer
    )
    try:
        journal, deadline = tmp_path / "run/keeplora/journal.jsonl", time.monotonic() + forked.patience()
        while not (journal.exists() and "PREPARED" in journal.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait(forked.patience())
        deadline = time.monotonic() + forked.patience()
        while (left := processes_of(tmp_path / "run")) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left
    finally:
        for number in processes_of(tmp_path / "run"):
            os.kill(number, signal.SIGKILL)
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    assert (2, "CLOSED") not in [(entry["task"], entry["stage"]) for entry in entries], (
        "stopped, not finished"
    )
    assert all(entry["info"]["threads"] >= 1 and entry["info"]["processes"] == 1 for entry in entries)


def under(tmp_path, program, monkeypatch):
    """A process below a program of that name, and whether the program counts as its launcher."""
    tmp_path.joinpath(program).symlink_to("/bin/sleep")
    parent = subprocess.Popen([tmp_path / program, "100"])
    while program.encode() not in Path(f"/proc/{parent.pid}/cmdline").read_bytes():
        time.sleep(0.01)  # Its command line is empty for a moment.
    monkeypatch.setattr(os, "getppid", lambda: parent.pid)
    return parent


@pytest.mark.parametrize(
    ("program", "launches"), [("torchrun", True), ("accelerate", True), ("deepspeed", True), ("bash", False)]
)
def test_launchers_are_known_by_their_command_and_their_end_is_noticed(
    program, launches, tmp_path, monkeypatch
):
    parent = under(tmp_path, program, monkeypatch)
    sent, kill = threading.Event(), os.kill
    monkeypatch.setattr(watched, "INTERVAL", 0.01)
    monkeypatch.setattr(
        os, "kill", lambda number, kind: sent.set() if number == os.getpid() else kill(number, kind)
    )
    try:
        assert list(watched.launchers_above()) == [parent.pid] * launches
        with watched.stopped_with_launcher():
            assert not sent.wait(0.1)
            parent.kill()
            parent.wait()
            assert sent.wait(5 if launches else 0.1) == launches
    finally:
        parent.kill()


def test_a_plain_start_has_no_launcher():
    # The module by itself: with its package it would bring all libraries of a run in.
    code = f'import runpy; print(runpy.run_path("{watched.__file__}")["launchers_above"]())'
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{code}' deepspeed; true"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "{}\n"
