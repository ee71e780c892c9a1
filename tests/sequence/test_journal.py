"""The journal: what comes next, a torn line, files that are not what a stage wrote."""

import json

import pytest

from llava_keeplora.errors import RunError
from llava_keeplora.journal import Entry, Journal, open_stages
from llava_keeplora.run_folder import BASE_STAGES, STAGES
from llava_keeplora_eval.files import file_hash

ORDER = [(0, s) for s in BASE_STAGES] + [(t, s) for t in (1, 2) for s in STAGES]
#: Of a run with two tasks that was extended by a third.
EXTENSION = [(0, "PLANNED"), (0, "EVALUATED"), (1, "EVALUATED"), (2, "EVALUATED"), *((3, s) for s in STAGES)]


def entries(order, tasks=2):
    """Entries of a run's order; each further plan has a task more."""
    found = []
    for pair in order:
        plans = sum((e.task, e.stage) == (0, "PLANNED") for e in found)
        found.append(Entry(*pair, info={"tasks": [{}] * (tasks + plans)} if pair == (0, "PLANNED") else {}))
    return found


def next_stage(done, **run):
    return next(iter(open_stages(done, **run)), None)


@pytest.mark.parametrize("done", range(len(ORDER)))
def test_the_next_stage_follows_from_what_is_done(done):
    assert next_stage(entries(ORDER[:done]), tasks=2) == ORDER[done]


def test_nothing_follows_the_last_stage():
    assert next_stage(entries(ORDER), tasks=2) is None
    assert next_stage(entries(ORDER[:4]), tasks=2, learns=False) is None


@pytest.mark.parametrize("done", range(len(EXTENSION)))
def test_an_extended_run_is_planned_and_scored_again_and_then_learns(done):
    assert next_stage(entries(ORDER + EXTENSION[:done]), tasks=3) == EXTENSION[done]


def test_a_method_that_learns_nothing_is_scored_on_the_new_task():
    assert open_stages(entries(ORDER[:4]), tasks=3, learns=False) == EXTENSION[:2]


@pytest.mark.parametrize("done", range(1, len(ORDER)))
def test_a_run_extended_before_its_end_scores_again_what_it_had_scored_and_goes_on(done):
    scored = [pair for pair in ORDER[:done] if pair[1] == "EVALUATED"]
    others = [pair for pair in ORDER[done:] if pair not in scored]
    order = [(0, "PLANNED"), *sorted(scored + others, key=ORDER.index), *EXTENSION[4:]]
    assert open_stages(entries(ORDER[:done]), tasks=3) == order


@pytest.mark.parametrize(
    "done",
    [
        [(0, "CONSOLIDATED")],
        [(0, "PLANNED"), (0, "PLANNED")],
        [(0, "PLANNED"), (0, "PREPARED")],
        [(0, "PLANNED"), (0, "UNHEARD OF")],
        [*ORDER, (3, "PLANNED")],
    ],
)
def test_stages_out_of_order_are_refused(done):
    with pytest.raises(
        RunError, match="the journal's stages are out of order; start over in a new output_dir"
    ):
        next_stage([Entry(*pair, info={"tasks": [{}, {}]}) for pair in done], tasks=2)


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for pair in ORDER[:3]:
        journal.append(Entry(*pair))
    return journal.path


def test_entries_come_back_as_they_were_written(path):
    assert [(e.task, e.stage) for e in Journal(path).entries] == ORDER[:3]


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_append(path, caplog, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    torn = path.read_bytes()
    journal = Journal(path)
    assert [(e.task, e.stage) for e in journal.entries] == ORDER[:2]
    assert "the last line is torn (a killed run); its stage runs again" in caplog.text
    assert path.read_bytes() == torn, "reading must not write: another process may be the one that writes"
    journal.append(Entry(*ORDER[2]))
    assert [(e.task, e.stage) for e in Journal(path).entries] == ORDER[:3]


def test_a_broken_line_in_the_middle_is_refused(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "nonsense\n" + lines[2])
    with pytest.raises(
        RunError,
        match="journal.jsonl, line 2 is not a journal entry \\(.*\\); restore the file or start over",
    ):
        Journal(path)


@pytest.fixture
def journal_with_file(tmp_path):
    (tmp_path / "delta").write_text("whole")
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(Entry(0, "PLANNED", files={"delta": file_hash(tmp_path / "delta")}))
    journal.verify()
    return journal


def test_a_file_that_is_not_what_its_stage_wrote_is_refused(journal_with_file, tmp_path):
    (tmp_path / "delta").write_text("other")
    with pytest.raises(
        RunError,
        match="delta is not what stage PLANNED of task 0 wrote; restore it or start over in a new output_dir",
    ):
        journal_with_file.verify()


def test_a_file_that_is_gone_is_refused(journal_with_file, tmp_path):
    (tmp_path / "delta").unlink()
    with pytest.raises(RunError, match="delta, written by stage PLANNED of task 0, is missing"):
        journal_with_file.verify()


def test_an_extension_may_make_scores_again_but_nothing_else(tmp_path):
    """A kill may come between the new scores and the line that has their hash."""
    journal = Journal(tmp_path / "journal.jsonl")
    names = ["scores.json", "delta.safetensors", "answers.jsonl"]
    for name in names:
        (tmp_path / name).write_text("first")
    journal.append(Entry(0, "EVALUATED", files={name: file_hash(tmp_path / name) for name in names}))
    for name in names:
        (tmp_path / name).write_text("second")
    assert len([*journal.problems()]) == 3
    journal.append(Entry(0, "PLANNED"))
    assert [str(problem).split()[0] for problem in journal.problems()] == [
        str(tmp_path / name) for name in names[1:]
    ]
    (tmp_path / "scores.json").unlink()
    assert len([*journal.problems()]) == 3


def test_a_file_that_was_written_again_is_what_its_last_stage_wrote(journal_with_file, tmp_path):
    (tmp_path / "delta").write_text("again")
    journal_with_file.append(Entry(0, "EVALUATED", files={"delta": file_hash(tmp_path / "delta")}))
    journal_with_file.verify()


def test_each_line_is_plain_json(path):
    assert {"task", "stage", "seconds", "files", "info"} == set(json.loads(path.read_text().splitlines()[0]))
