"""Whatever makes a folder is killed within its writes, flushes, renames and removals: the folder is whole or not there, and the same command goes on.

What they share, `whole_folder`, is killed at every one; commands that make hundreds at every third or seventeenth, and in the slow forms at every one.
"""

import builtins
import os
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from llava_keeplora import files
from llava_keeplora.analysis import writers as analysis_folder
from llava_keeplora.compare import writers as tables
from llava_keeplora.doctor import examine_run
from llava_keeplora.errors import UserError
from llava_keeplora.export import adapter_set, export_run, export_set, import_state, run_export
from llava_keeplora.files import left_behind, whole_folder
from llava_keeplora.report import run_report
from llava_keeplora.sequence.fork import fork
from llava_keeplora_eval import files as eval_files


class Killed(BaseException):
    """What a kill is inside of one process."""


class Deadly:
    """Raises at one of all changes to the file system; from then on nothing changes, as no cleaning up follows a kill."""

    def __init__(self, patch):
        self.patch, self.fatal, self.count, self.dead = patch, None, 0, False
        for owner, name in (
            (os, "replace"),
            (os, "fsync"),
            (os, "unlink"),
            (os, "mkdir"),
            (shutil, "rmtree"),
            (shutil, "copyfile"),
        ):
            self.wrap(owner, name)
        for module in (files, eval_files):
            patch.setattr(module, "open", self.opened, raising=False)

    def wrap(self, owner, name):
        inner = getattr(owner, name)

        def outer(*args, **kwargs):
            self.step()
            return None if self.dead else inner(*args, **kwargs)

        self.patch.setattr(owner, name, outer)

    def opened(self, path, mode="r", **kwargs):
        file = builtins.open(path, mode, **kwargs)
        if "w" in mode:
            self.step(lambda: (file.write(b"half"), file.close()))
        return file

    def step(self, before_death=lambda: None):
        self.count += not self.dead
        if self.count == self.fatal and not self.dead:
            before_death()
            self.dead = True
            raise Killed

    def run(self, command, fatal):
        """Run; returns whether it was killed."""
        self.fatal, self.count, self.dead = fatal, 0, False
        try:
            command()
        except Killed:
            return True
        finally:
            self.fatal, self.dead = None, False
        return False


@pytest.fixture
def deadly(monkeypatch):
    return Deadly(monkeypatch)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def kill_everywhere(deadly, command, into, changes=lambda name: False, stride=1):
    """Kill a command at every change that it makes, and run it once more after each.

    Args:
        command: takes the folder that it makes.
        changes: names of files that are not the same from run to run.
        stride: kill at every so-manieth change alone.
    """
    kept = lambda folder: {name: content for name, content in contents(folder).items() if not changes(name)}  # noqa: E731
    command(into)
    whole, fatal, died = kept(into), 1, 0
    while True:
        shutil.rmtree(into)
        if not deadly.run(lambda: command(into), fatal):
            break
        died += 1
        assert not into.exists() or kept(into) == whole, f"half a folder after change {fatal}"
        if not into.exists() and died % 5 == 1:
            command(into)
            assert kept(into) == whole and not left_behind(into)
        elif not into.exists():
            into.mkdir()
        fatal += stride
    return died


def test_a_folder_that_takes_anothers_place_is_the_old_one_the_new_one_or_none(deadly, tmp_path):
    into = tmp_path / "export"

    def fill(text):
        with whole_folder(into) as room:
            for name in ("a", "below/b"):
                files.write_bytes(room / name, text)

    fatal = 1
    while True:
        shutil.rmtree(into, ignore_errors=True)
        fill(b"old")
        if not deadly.run(lambda: fill(b"new"), fatal):
            break
        assert not into.exists() or (
            set(contents(into).values()) in ({b"old"}, {b"new"}) and len(contents(into)) == 2
        )
        fill(b"again")
        assert set(contents(into).values()) == {b"again"} and [path.name for path in tmp_path.iterdir()] == [
            "export"
        ]
        fatal += 1
    assert fatal > 10


def test_files_are_replaced_in_a_folder_that_stays_when_all_are_written_and_others_stay(deadly, tmp_path):
    into, other = tmp_path / "run", tmp_path / "run/config.json"
    files.write_bytes(other, b"{}")

    def fill(text):
        with whole_folder(into, replace=False) as room:
            for name in ("table.md", "pictures/a.png"):
                files.write_bytes(room / name, text)

    fatal = 1
    while deadly.run(lambda: fill(b"new"), fatal):
        fill(b"old")
        assert contents(into) == {"config.json": b"{}", "table.md": b"old", "pictures/a.png": b"old"}
        fatal += 1
    assert (
        contents(into) == {"config.json": b"{}", "table.md": b"new", "pictures/a.png": b"new"} and fatal > 10
    )


@pytest.fixture(params=["some", pytest.param("every", marks=pytest.mark.slow)])
def stride(request):
    """Function (n): kill at every n-th change, or in the slow form at every one."""
    return lambda n: n if request.param == "some" else 1


@pytest.mark.slow
def test_a_killed_fork_is_whole_or_not_there_and_the_same_command_goes_on(
    deadly, two_tasks_run, tmp_path, stride
):
    assert (
        kill_everywhere(
            deadly, lambda into: fork(two_tasks_run, 1, into), tmp_path / "fork", stride=stride(3)
        )
        > 30
    )


@pytest.fixture(scope="module")
def state(two_tasks_run, tmp_path_factory):
    """An exported state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_export, "verify_export", lambda folder, form, base, batch, meant, layers: (meant, meant)
        )
        into = tmp_path_factory.mktemp("state") / "state"
        export_run(two_tasks_run, "state", into, label="keeplora", base_id="you/tiny-base")
    return into


@pytest.mark.slow
def test_a_killed_import_is_whole_or_not_there_and_the_same_command_goes_on(
    deadly, state, tiny_clip, tmp_path, stride
):
    command = lambda into: import_state(str(state), into, base=str(tiny_clip))  # noqa: E731
    assert kill_everywhere(deadly, command, tmp_path / "run", stride=stride(3)) > 20


def test_a_killed_export_is_whole_or_not_there_and_the_same_command_goes_on(
    deadly, two_tasks_run, tmp_path, monkeypatch, stride
):
    monkeypatch.setattr(
        run_export, "verify_export", lambda folder, form, base, batch, meant, layers: (meant, meant)
    )

    def command(into):
        return export_run(two_tasks_run, "state", into, label="keeplora", base_id="you/tiny-base", examples=1)

    assert (
        kill_everywhere(
            deadly, command, tmp_path / "state", lambda name: name.endswith(".png"), stride=stride(17)
        )
        > 5
    )


@pytest.mark.slow
def test_a_killed_export_of_a_set_is_whole_or_not_there_and_the_same_command_goes_on(
    deadly, two_tasks_run, tmp_path, monkeypatch, stride
):
    monkeypatch.setattr(adapter_set, "verify_set", lambda folder, base, batch, expected, layers: expected)
    logits = adapter_set._stage_logits
    known = []

    def once(learned, data):
        known[:] = known or logits(learned, data)
        return known

    monkeypatch.setattr(adapter_set, "_stage_logits", once)

    def command(into):
        return export_set(two_tasks_run, into, label="keeplora", base_id="you/tiny-base", examples=1)

    pictures = lambda name: name.endswith(".png")  # noqa: E731
    assert kill_everywhere(deadly, command, tmp_path / "set", pictures, stride=stride(29)) > 3


@pytest.mark.slow
def test_a_killed_report_is_whole_or_not_there_and_the_same_command_goes_on(
    deadly, two_tasks_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(import_module("llava_keeplora.report.write_report"), "_plots", lambda *args: ())
    assert (
        kill_everywhere(
            deadly, lambda into: run_report.write_run_report(two_tasks_run, into=into), tmp_path / "report"
        )
        > 20
    )


def test_a_killed_table_and_analysis_are_whole_or_not_there(deadly, tmp_path, monkeypatch):
    """Their writers; what fills them is tested elsewhere."""

    def table(into):
        from types import SimpleNamespace

        monkeypatch.setattr(
            tables, "sections_of", lambda *args: [tables.Section("Order a", "", ["method"], [["keeplora"]])]
        )
        tables.write_table(SimpleNamespace(output_dir=into), SimpleNamespace(results={}, tried=[]))

    def analysis(into):
        with analysis_folder.output_folder(into) as room:
            for name in ("updates.json", "updates.csv"):
                files.write_json(room / name, {})

    assert kill_everywhere(deadly, table, tmp_path / "table") > 10
    assert kill_everywhere(deadly, analysis, tmp_path / "analysis") > 10


def test_what_a_kill_left_is_named_by_doctor_and_goes_with_the_same_command(deadly, two_tasks_run, tmp_path):
    run = shutil.copytree(two_tasks_run, tmp_path / "run")
    assert deadly.run(lambda: fork(run, 1, run / "fork"), 30)
    (told,) = [str(found) for found in examine_run(run) if isinstance(found, UserError)]
    assert (
        ".fork." in told and "is what a killed command left; run that command again, which removes it" in told
    )
    fork(run, 1, run / "fork")
    assert not left_behind(run)


def test_a_process_that_is_really_killed_leaves_no_folder_under_the_name(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from llava_keeplora.files import whole_folder\n"
        f"with whole_folder(Path({str(tmp_path / 'made')!r})) as room:\n (room / 'a').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not (tmp_path / "made").exists() and len(left_behind(tmp_path)) == 1
    with whole_folder(tmp_path / "made") as room:
        assert isinstance(room, Path) and len(list(tmp_path.iterdir())) == 1
