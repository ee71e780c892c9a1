"""A run with a guard: every task is judged, and one that breaks a limit is taken back without a trace."""

import json
from pathlib import Path

import pytest

from llava_keeplora.config import parse_config
from llava_keeplora.doctor import examine_run
from llava_keeplora.errors import ConfigError
from llava_keeplora.guard import exit_code
from llava_keeplora.saved_run import extended
from llava_keeplora.sequence import guarding
from llava_keeplora.sequence.fork import fork
from llava_keeplora_eval import Matrix

WATCH = {"watch": [{"task": "shapes", "examples": 40}], "watch_tasks": {"max_drop": 100}}


@pytest.fixture
def breaks(monkeypatch):
    """Function (name) → every verdict on that task is that a limit is broken, of others that all are held."""

    def set_task(name: str) -> None:
        judge = guarding.judge

        def judged(task, limits, confidence):
            record = judge(task, limits, confidence)
            return record | {"ship": task != name}

        monkeypatch.setattr(guarding, "judge", judged)

    return set_task


@pytest.fixture
def guarded(run_tree, tiny_tasks):
    """Function (folder, tasks, **guard) → a run of KeepLoRA on some of the tiny tasks with a guard."""

    def build(folder: Path, tasks: list[int], **guard):
        tree = run_tree(folder, tasks=[str(tiny_tasks[i]) for i in tasks])
        tree["methods"] = {"keeplora": {}}
        return parse_config(tree | {"guard": {**WATCH, **guard}})

    return build


def hashes(folder: Path, task: str) -> dict[str, bytes]:
    """A task's files but the verdict's, by name."""
    (found,) = folder.glob(f"keeplora/task-*-{task}")
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in found.rglob("*")
        if (p.is_file() and p.suffix in (".safetensors", ".jsonl")) or p.name == "consolidated.json"
    }


@pytest.mark.slow
def test_a_task_that_is_rolled_back_leaves_no_trace_in_the_next(guarded, driven, breaks, tmp_path):
    breaks("stripes")
    folder = driven(guarded(tmp_path / "run", [0, 1, 2], on_failure="rollback"))
    never = driven(guarded(tmp_path / "never", [0, 2], on_failure="rollback"))
    found, expected = hashes(folder, "corners"), hashes(never, "corners")
    assert {"keeplora/task-02-corners/" + name for name in ("delta.safetensors", "state.safetensors")} <= set(
        found
    )
    # It is scored on the task that was taken back too.
    extra = {name for name in found if name.endswith("stripes.jsonl")}
    assert {name: content for name, content in found.items() if name not in extra} == expected
    # What was learned is kept aside, and the matrix repeats the row of the task before.
    assert (folder / "keeplora/aside/01-stripes/delta.safetensors").is_file()
    matrix = Matrix.from_json(folder / "keeplora/matrix.json")
    assert matrix.rows[1] == matrix.rows[0] and matrix.complete
    assert exit_code(folder) == 3 and exit_code(folder, "corners") == 0
    verdicts = json.loads((folder / "guard.json").read_text())["methods"]["keeplora"]
    assert [(v["task"], v["ship"], v["then"]) for v in verdicts] == [
        ("colours", True, None),
        ("stripes", False, "rollback"),
        ("corners", True, None),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_every_stage_of_a_guarded_run_ends_with_the_same_files(
    guarded, run_to_the_end, driven, breaks, stop_at_every_stage, left_behind, tmp_path, when
):
    breaks("stripes")
    whole = left_behind(driven(guarded(tmp_path / "whole", [0, 1, 2], on_failure="rollback")))
    stop_at_every_stage(when)
    run_to_the_end(guarded(tmp_path / "run", [0, 1, 2], on_failure="rollback"))
    assert left_behind(tmp_path / "run") == whole


@pytest.mark.slow
def test_stop_leaves_all_in_place_and_goes_on_when_told_to_warn(guarded, driven, breaks, tmp_path):
    breaks("stripes")
    folder = driven(guarded(tmp_path / "run", [0, 1, 2], on_failure="stop"))
    assert (folder / "keeplora/task-02-stripes/delta.safetensors").is_file()
    assert not list(folder.glob("keeplora/task-03-*")) and exit_code(folder) == 3
    driven(guarded(tmp_path / "run", [0, 1, 2], on_failure="warn"))
    assert (folder / "keeplora/task-03-corners/guard.json").is_file()


def test_a_watched_recipe_is_none_of_the_tasks(guarded, driven, tiny_tasks, tmp_path):
    with pytest.raises(ConfigError, match="watches 'colours', which is a task of the run"):
        driven(guarded(tmp_path / "run", [0, 1], watch=[str(tiny_tasks[0])]))
    assert not (tmp_path / "run/keeplora").exists()


def test_a_watched_recipe_without_its_data_is_refused_before_anything_is_computed(guarded, driven, tmp_path):
    recipe = tmp_path / "gone.yaml"
    recipe.write_text("extends: shapes\n")
    config = guarded(tmp_path / "run", [0], watch=[str(recipe)])
    recipe.unlink()
    with pytest.raises(ConfigError, match="gone"):
        driven(config)


@pytest.mark.slow
def test_a_fork_of_a_run_with_a_rollback_never_had_the_task(guarded, driven, breaks, tmp_path, tiny_tasks):
    breaks("stripes")
    folder = driven(guarded(tmp_path / "run", [0, 1, 2], on_failure="rollback"))
    config = fork(folder, 2, tmp_path / "fork")
    assert [Path(task).stem for task in config.tasks] == ["colours", "corners"]
    for name in ("delta", "state"):
        path = f"keeplora/task-02-corners/{name}.safetensors"
        assert (tmp_path / "fork" / path).read_bytes() == (folder / path).read_bytes()
    # The task comes back with other settings, at the end.
    driven(extended(tmp_path / "fork", str(tiny_tasks[1]), {"learning_rate": 0.001}))
    assert (tmp_path / "fork/keeplora/aside/01-stripes/guard.json").is_file()
    assert not [found for found in examine_run(folder) if isinstance(found, Exception)]
