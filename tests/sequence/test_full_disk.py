"""A file system that refuses a write ends a run with one sentence, and the same command goes on once it does not."""

import errno
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from llava_keeplora.errors import RunError
from llava_keeplora.journal import Journal
from llava_keeplora.sequence.fork import fork
from llava_keeplora.sequence.workspace import Workspace


@contextmanager
def largest_file(size: int):
    """No file of this process may grow beyond so many bytes: writes fail in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def config(run_config, tiny_tasks, tmp_path, two_tasks_run):
    """A run on two tasks; `two_tasks_run` has made the data's own caches."""
    return run_config(tmp_path / "run", tasks=[str(path) for path in tiny_tasks[:2]])


#: Bytes, and whether the folder was claimed before: the first write that fails is of the folder's own files, of answers, of a journal or of tensors.
SIZES = [
    (2500, False),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [(300, False), (1270, True), (1400, True), (5000, True), (12000, True)]
    ),
]


@pytest.mark.parametrize(("size", "claimed"), SIZES)
def test_a_full_disk_is_one_sentence_and_a_start_with_room_ends_with_the_same_files(
    config, drive, two_tasks_run, left_behind, size, claimed
):
    if claimed:
        with Workspace(config).locked():
            Workspace(config).claim()
    with largest_file(size), pytest.raises(RunError) as caught:
        drive(config)
    root = Path(config.output_dir)
    assert str(caught.value) == (
        f"there is no room for {root} (File too large); make room, and run the same command again: it goes on, every finished stage is kept."
    )
    kept = {path: [*Journal(path).entries] for path in root.rglob("journal.jsonl")}
    for path in kept:
        Journal(path).verify()
    drive(config)
    assert left_behind(root) == left_behind(two_tasks_run)
    assert all(Journal(path).entries[: len(entries)] == entries for path, entries in kept.items()), (
        "what was finished is not done again"
    )
    assert not list(root.rglob("*.part"))


def test_a_journal_line_that_a_full_disk_tore_is_written_again(tmp_path):
    from llava_keeplora.journal import Entry

    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(Entry(0, "PLANNED"))
    with largest_file(100), pytest.raises(OSError, match="File too large"):
        journal.append(Entry(0, "CONSOLIDATED"))
    assert len(journal.path.read_bytes()) == 100
    again = Journal(journal.path)
    assert len(again.entries) == 1
    again.append(Entry(0, "CONSOLIDATED"))
    assert [entry.stage for entry in Journal(journal.path).entries] == ["PLANNED", "CONSOLIDATED"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_becomes_read_only_is_named(
    config, drive, monkeypatch, number, two_tasks_run, left_behind
):
    import os

    def refuse(self, entry):
        raise OSError(number, os.strerror(number), str(self.path))

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", refuse)
        with pytest.raises(
            RunError,
            match=r"zero-shot/journal.jsonl cannot be used \(.*\); give this user the right to it, and run the same command again",
        ):
            drive(config)
    drive(config)
    assert left_behind(config.output_dir) == left_behind(two_tasks_run)


def test_a_fork_without_room_is_one_sentence_and_no_run(two_tasks_run, tmp_path, left_behind):
    before = left_behind(two_tasks_run)
    with largest_file(3000), pytest.raises(RunError, match="there is no room for .*fork"):
        fork(two_tasks_run, 1, tmp_path / "fork")
    assert not (tmp_path / "fork").exists() and left_behind(two_tasks_run) == before


def test_a_torn_last_line_of_a_finished_run_costs_one_stage(config, drive, two_tasks_run, left_behind):
    drive(config)
    journal = Path(config.output_dir) / "keeplora/journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])
    drive(config)
    assert left_behind(config.output_dir) == left_behind(two_tasks_run)
