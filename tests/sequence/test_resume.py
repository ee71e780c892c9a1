"""Running and resuming are the same code: wherever a run stops, it ends with the same files."""

import subprocess
import sys

import pytest

from llava_keeplora.files import whole_folder
from llava_keeplora.journal import Journal


def stopping(monkeypatch, when, stopped):
    """Stop at every append of the journal, before or after the line is on disk; once per stage."""
    append, seen = Journal.append, set()

    def stop(self, entry):
        key = (self.path, entry.task, entry.stage)
        if when == "before" and key not in seen:
            seen.add(key)
            raise stopped
        append(self, entry)
        if when == "after":
            raise stopped

    monkeypatch.setattr(Journal, "append", stop)


# A stop before the line loses the stage's work; after it, only the process, as every stop does.
@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "methods", [["keeplora"], pytest.param(["seq-lora", "keeplora"], marks=pytest.mark.slow)], ids="-".join
)
def test_a_run_stopped_at_every_stage_ends_with_the_same_files(
    run_config, run_to_the_end, stopped, monkeypatch, tmp_path, three_tasks_run, left_behind, methods, when
):
    stopping(monkeypatch, when, stopped)
    starts = run_to_the_end(run_config(tmp_path / "run", methods={name: {} for name in methods}))
    assert starts == 1 + 4 + len(methods) * (4 + 3 * 6), (
        "every stage of the base and of the tasks of every method was a stop"
    )
    # What a method leaves is the same with others next to it.
    found, whole = left_behind(tmp_path / "run"), left_behind(three_tasks_run)
    for label in ("zero-shot", *methods):
        files = [{n: v for n, v in run.items() if n.startswith(f"{label}/")} for run in (found, whole)]
        assert files[0] and files[0] == files[1]
    assert len(methods) == 1 or found == whole


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])
def test_a_run_stopped_within_training_ends_with_the_same_files(
    run_config, run_to_the_end, stop_within_training, tmp_path, three_tasks_run, left_behind, step
):
    stop_within_training(step)
    assert run_to_the_end(run_config(tmp_path / "run")) == 4
    assert left_behind(tmp_path / "run") == left_behind(three_tasks_run)


def test_a_method_next_to_others_learns_what_it_learns_alone(
    run_config, drive, tmp_path, three_tasks_run, left_behind
):
    drive(run_config(tmp_path / "run", methods={"keeplora": {}}))
    alone, beside = left_behind(tmp_path / "run"), left_behind(three_tasks_run)
    shared = {name for name in alone if name.startswith("keeplora/")}
    assert {name: alone[name] for name in shared} == {
        name: beside[name] for name in beside if name.startswith("keeplora/")
    }


def test_a_finished_run_started_again_changes_nothing_and_gives_the_same_results(
    run_config, drive, monkeypatch, tmp_path
):
    config = run_config(tmp_path / "run", methods={"keeplora": {}})
    config = run_config(tmp_path / "run", methods={"keeplora": {}}, tasks=list(config.tasks[:1]))
    first = drive(config)
    monkeypatch.setattr(Journal, "append", lambda *args: pytest.fail("a stage ran again"))
    second = drive(config)
    assert {k: m.to_dict() for k, m in first.items()} == {k: m.to_dict() for k, m in second.items()}


def test_another_seed_gives_other_weights(run_config, drive, tmp_path, three_tasks_run, left_behind):
    drive(run_config(tmp_path / "run", methods={"seq-lora": {}}, seed=1))
    delta = "seq-lora/task-01-colours/delta.safetensors"
    assert left_behind(tmp_path / "run")[delta] != left_behind(three_tasks_run)[delta]


def test_a_lost_matrix_is_written_again_from_the_scores(
    run_config, drive, tmp_path, run_tree, tiny_tasks, left_behind
):
    config = run_config(tmp_path / "run", methods={"seq-lora": {}}, tasks=[str(tiny_tasks[0])])
    drive(config)
    before = left_behind(tmp_path / "run")
    (tmp_path / "run/seq-lora/matrix.json").unlink()
    drive(config)
    assert left_behind(tmp_path / "run") == before


def test_a_folder_that_a_killed_export_left_stops_no_run_and_goes_with_the_next_export(
    run_config, drive, tmp_path, tiny_tasks
):
    config = run_config(tmp_path / "run", methods={"seq-lora": {}}, tasks=[str(tiny_tasks[0])])
    left = tmp_path / "run/export/.adapter.1.part"
    drive(config)
    left.mkdir(parents=True)
    drive(config)
    with whole_folder(tmp_path / "run/export/adapter"):
        assert not left.exists()


@pytest.mark.slow
def test_what_an_export_is_writing_is_left_alone_by_a_start_of_the_run_and_by_another_export(
    run_config, drive, tmp_path, tiny_tasks
):
    config = run_config(tmp_path / "run", methods={"seq-lora": {}}, tasks=[str(tiny_tasks[0])])
    drive(config)
    target = tmp_path / "run/export/adapter"
    another = f"from pathlib import Path; from llava_keeplora.files import whole_folder; whole_folder(Path({str(target)!r})).__enter__()"
    with whole_folder(target) as room:
        unfinished = room / ".weights.part"
        unfinished.write_text("half")
        drive(config)
        subprocess.run([sys.executable, "-c", another], check=True)
        assert unfinished.read_text() == "half"
    assert (target / ".weights.part").exists()


def test_a_run_says_with_how_many_threads_it_was_begun_and_warns_where_they_change(tmp_path, caplog):
    import json

    from llava_keeplora.versions import version_changes, worker_changes, worker_counts, write_versions

    write_versions(tmp_path)
    assert json.loads((tmp_path / "versions.json").read_text())["threads"] == str(worker_counts()["threads"])
    assert worker_changes(tmp_path) == [] and version_changes(tmp_path) == []
    begun = json.loads((tmp_path / "versions.json").read_text())
    (tmp_path / "versions.json").write_text(json.dumps(begun | {"threads": "77"}))
    assert (
        worker_changes(tmp_path) == [f"threads 77 → {worker_counts()['threads']}"]
        and version_changes(tmp_path) == []
    )
    (tmp_path / "versions.json").write_text(
        json.dumps({name: value for name, value in begun.items() if name not in ("threads", "processes")})
    )
    assert worker_changes(tmp_path) == [], "a run of an earlier release"
