"""A fork holds the beginning of a run, as if that had never had more, and goes its own way."""

import shutil

import pytest

from llava_keeplora.errors import RunError
from llava_keeplora.journal import Journal
from llava_keeplora.saved_run import extended, load_run
from llava_keeplora.sequence.fork import fork


@pytest.fixture(scope="module")
def forked(three_tasks_run, tmp_path_factory):
    """A fork after the second of three tasks; shared, so copy it before changing it."""
    into = tmp_path_factory.mktemp("fork") / "run"
    fork(three_tasks_run, 2, into)
    return into


def test_a_fork_is_the_run_that_never_had_more_tasks(forked, two_tasks_run, left_behind):
    """Journals included; results.json is what a run writes at its end."""
    expected = left_behind(two_tasks_run)
    del expected["results.json"]
    assert left_behind(forked) == expected


def test_a_fork_followed_by_the_same_task_equals_the_run(
    forked, three_tasks_run, drive, outcome, tiny_tasks, tmp_path
):
    run = shutil.copytree(forked, tmp_path / "run")
    drive(extended(run, str(tiny_tasks[2])))
    assert outcome(run) == outcome(three_tasks_run)


def test_a_fork_of_an_extended_run_is_that_of_a_run_that_had_the_task_from_the_start(
    forked, two_tasks_run, drive, left_behind, tiny_tasks, tmp_path
):
    run = shutil.copytree(two_tasks_run, tmp_path / "run")
    drive(extended(run, str(tiny_tasks[2])))
    fork(run, 2, tmp_path / "fork")
    assert left_behind(tmp_path / "fork") == left_behind(forked)


def test_a_fork_may_learn_another_task_and_the_run_stays_as_it_was(
    three_tasks_run, drive, outcome, tiny_tasks, tmp_path
):
    before = outcome(three_tasks_run)
    fork(three_tasks_run, 1, tmp_path / "fork")
    matrix = drive(extended(tmp_path / "fork", str(tiny_tasks[2])))["keeplora"]
    assert matrix.tasks == ["colours", "corners"] and matrix.complete
    assert outcome(three_tasks_run) == before


def test_a_run_that_kept_no_task_has_nothing_to_fork(three_tasks_run, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_keeplora.sequence.fork._kept_places", lambda *run: [])
    with pytest.raises(RunError, match="every task of .* was rolled back"):
        fork(three_tasks_run, 1, tmp_path / "fork")


def test_a_fork_shares_no_file_with_the_run(forked, three_tasks_run):
    shared = {path.stat().st_ino for path in forked.rglob("*") if path.is_file()} & {
        path.stat().st_ino for path in three_tasks_run.rglob("*") if path.is_file()
    }
    assert not shared and load_run(forked).output_dir == str(forked)


@pytest.mark.parametrize("at_task", [0, 4])
def test_a_fork_at_a_task_that_is_not_there_is_refused(three_tasks_run, tmp_path, at_task):
    with pytest.raises(
        RunError, match=f"--at-task must be from 1 to 3.*got {at_task}.*choose one from 1 to 3"
    ):
        fork(three_tasks_run, at_task, tmp_path / "fork")


def test_a_fork_into_a_folder_that_holds_something_is_refused(three_tasks_run, two_tasks_run, outcome):
    before = outcome(two_tasks_run)
    with pytest.raises(
        RunError, match="exists already and is not an empty folder; choose another one with --into"
    ):
        fork(three_tasks_run, 2, two_tasks_run)
    assert outcome(two_tasks_run) == before


def test_a_fork_of_a_damaged_run_is_refused_by_file_and_leaves_nothing(three_tasks_run, tmp_path):
    run = shutil.copytree(three_tasks_run, tmp_path / "run")
    delta = run / "keeplora/task-02-stripes/delta.safetensors"
    delta.write_bytes(delta.read_bytes()[:-1])
    with pytest.raises(
        RunError, match="task-02-stripes/delta.safetensors is missing or not what the run wrote; restore it"
    ):
        fork(run, 2, tmp_path / "fork")
    assert not (tmp_path / "fork").exists()


def test_a_fork_before_its_task_is_finished_is_refused_and_an_earlier_one_is_not(
    run_config, drive, stopped, monkeypatch, tmp_path, left_behind, forked
):
    append = Journal.append

    def stop(self, entry):
        if self.path.parent.name == "keeplora" and (entry.task, entry.stage) == (3, "CONSOLIDATED"):
            raise stopped
        append(self, entry)

    monkeypatch.setattr(Journal, "append", stop)
    with pytest.raises(stopped):
        drive(run_config(tmp_path / "run"))
    with pytest.raises(
        RunError,
        match="keeplora has not finished stage CONSOLIDATED of task 3; let the run go on to its end first, or choose an earlier",
    ):
        fork(tmp_path / "run", 3, tmp_path / "fork")
    monkeypatch.undo()
    fork(tmp_path / "run", 2, tmp_path / "fork")
    assert left_behind(tmp_path / "fork") == left_behind(forked)
