"""A run with a guard: every task is judged, and one that breaks a limit is taken back without a trace."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_keeplora.adapters import load_deltas
from llava_keeplora.config import parse_config
from llava_keeplora.doctor import examine_run
from llava_keeplora.errors import ConfigError
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.guard import exit_code
from llava_keeplora.guard.text import shrink_lines
from llava_keeplora.journal import Entry, Journal, shrunk
from llava_keeplora.run_folder import Stage
from llava_keeplora.saved_run import extended
from llava_keeplora.sequence import guarding, shrinking
from llava_keeplora.sequence.fork import fork
from llava_keeplora_eval import Matrix
from llava_keeplora_eval.files import file_hash

WATCH = {"watch": [{"task": "shapes", "examples": 40}], "watch_tasks": {"max_drop": 100}}


@pytest.fixture
def breaks(monkeypatch):
    """Function (name, even_smaller) → verdicts on that task are that its limits are broken.

    Those on an update that got smaller are so too, unless `even_smaller` is false; those on other tasks are as they are.
    """

    def set_task(name: str, even_smaller: bool = True) -> None:
        judge, limits_of, broken, whole = guarding.judge, guarding._limits, {"outcome": "broken"}, True

        def limits(state, index):
            nonlocal whole
            whole = shrunk(state.journal.entries, index) is None
            return limits_of(state, index)

        def judged(task, limits, confidence):
            record = judge(task, limits, confidence)
            if task != name or not (whole or even_smaller):
                return record
            return record | {"ship": False, "limits": [limit | broken for limit in record["limits"]]}

        monkeypatch.setattr(guarding, "_limits", limits)
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
@pytest.mark.parametrize("then", ["rollback", "shrink"])
def test_a_kill_at_every_stage_of_a_guarded_run_ends_with_the_same_files(
    guarded, run_to_the_end, driven, breaks, stop_at_every_stage, left_behind, tmp_path, when, then
):
    breaks("stripes", even_smaller=then == "rollback")
    whole = left_behind(driven(guarded(tmp_path / "whole", [0, 1, 2], on_failure=then)))
    stop_at_every_stage(when)
    run_to_the_end(guarded(tmp_path / "run", [0, 1, 2], on_failure=then))
    assert left_behind(tmp_path / "run") == whole
    aside = {"rollback": "aside/01-stripes", "shrink": "task-02-stripes/unshrunk"}[then]
    assert f"keeplora/{aside}/delta.safetensors" in whole


@pytest.mark.slow
def test_a_task_of_which_no_smaller_update_ships_is_rolled_back_without_a_trace(
    guarded, driven, breaks, tmp_path
):
    breaks("stripes")
    folder = driven(guarded(tmp_path / "run", [0, 1, 2], on_failure="shrink"))
    never = driven(guarded(tmp_path / "never", [0, 2], on_failure="shrink"))
    found, expected = hashes(folder, "corners"), hashes(never, "corners")
    assert expected == {key: content for key, content in found.items() if not key.endswith("stripes.jsonl")}
    aside = folder / "keeplora/aside/01-stripes"
    assert (aside / "delta.safetensors").is_file() and (aside / "unshrunk/delta.safetensors").is_file()
    assert json.loads((aside / "guard.json").read_text())["then"] == "rollback" and exit_code(folder) == 3
    assert not [found for found in examine_run(folder) if isinstance(found, Exception)]


@pytest.mark.parametrize(
    ("harm", "gain", "expected"),
    [
        (2.0, 0.0, 7 / 16),  # The measured drop may be as large as the limit, 1.
        (100.0, 0.0, 0.0),
        (0.0, 0.0, 15 / 16),
        (2.0, 4.0, 7 / 16),
        (2.0, 10.0, 0.0),  # What holds the drop gains too little.
    ],
)
def test_the_largest_share_that_holds_every_limit_is_found(monkeypatch, harm, gain, expected):
    new, old = (SimpleNamespace(name=name, test=None) for name in ("new", "old"))
    limits = [("new task", new, gain), ("old task", old, -1.0)]
    monkeypatch.setattr(shrinking, "_limits", lambda state, index: limits)
    monkeypatch.setattr(
        shrinking,
        "_answer",
        lambda state, index, share, limits: ({"new": 10 * share, "old": -(harm + 0.25) * share}, []),
    )
    monkeypatch.setattr(
        shrinking, "paired_change", lambda data, before, after, level: SimpleNamespace(points=after - before)
    )
    record, _ = shrinking.search(None, 1)
    assert record["lambda"] == expected and len(record["trials"]) == 4
    assert "share" in " ".join(shrink_lines({"task": "new", "shrink": record}))


@pytest.mark.parametrize("stage", [Stage.SHRUNK, Stage.ROLLED_BACK])
@pytest.mark.parametrize("kill", [1, 2, 3])
def test_a_kill_while_files_move_aside_is_made_good_at_the_next_start(tmp_path, stage, kill):
    folder, names = tmp_path / "task-01-a", ["delta.safetensors", "watched/b.jsonl", "guard.json"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    hashes = {f"task-01-a/{name}": file_hash(folder / name) for name in names}
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(Entry(1, Stage.TRAINED, files=hashes))
    gone = {"task": "a", "folder": "task-01-a", "aside": "aside/01-a"}
    info = {"shrunk": 0.5} if stage == Stage.SHRUNK else {"rolled_back": gone}
    journal.append(Entry(1, stage, info=info))
    context = SimpleNamespace(rank=0, barrier=lambda: None)
    state = SimpleNamespace(journal=journal, folder=tmp_path, context=context)
    if (process := os.fork()) == 0:
        rename, calls = os.rename, iter(range(1, 9))
        os.rename = lambda *paths: (
            os.kill(os.getpid(), signal.SIGKILL) if next(calls) == kill else rename(*paths)
        )
        guarding.set_aside(state)
        os._exit(0)
    os.waitpid(process, 0)
    for _ in range(2):  # The next start, and any later one.
        guarding.set_aside(state)
        aside = tmp_path / ("task-01-a/unshrunk" if stage == Stage.SHRUNK else "aside/01-a")
        assert [(aside / name).read_text() for name in names] == names
        Journal(journal.path).verify()
        left = [path for path in folder.rglob("*") if path.is_file() and aside not in path.parents]
        assert not left


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


@pytest.mark.slow
def test_an_update_that_breaks_a_limit_gets_smaller_and_nothing_later_knows_the_whole_one(
    guarded, driven, breaks, tmp_path
):
    breaks("stripes", even_smaller=False)
    folder = driven(guarded(tmp_path / "run", [0, 1, 2], on_failure="shrink"))
    label, task = folder / "keeplora", folder / "keeplora/task-02-stripes"
    verdict = json.loads((task / "guard.json").read_text())
    share = verdict["shrink"]["lambda"]
    assert share == 15 / 16 and [t["lambda"] for t in verdict["shrink"]["trials"]] == [
        0.5,
        0.75,
        0.875,
        share,
    ]
    assert (
        verdict["ship"] and verdict["shrink"]["limits"][0]["outcome"] == "broken" and exit_code(folder) == 0
    )
    # What is on the base, what the next task's subspace is made from, and what is exported is W + λΔ.
    whole, smaller = (load_deltas(place / "delta.safetensors") for place in (task / "unshrunk", task))
    for name, delta in smaller.items():
        assert torch.allclose(delta.dense(), whole[name].dense() * share, rtol=1e-6, atol=0)
    learned = load_learned_run(folder, None, 2)
    assert all(torch.equal(learned.deltas[1][n].dense(), delta.dense()) for n, delta in smaller.items())
    state = [(place / "state.safetensors").read_bytes() for place in (task / "unshrunk", task)]
    assert state[0] != state[1] and (label / "task-03-corners/guard.json").is_file()
    assert not [found for found in examine_run(folder) if isinstance(found, Exception)]
    # The held-out examples are in nobody's training.
    plan = json.loads((label / "journal.jsonl").read_text().splitlines()[0])["info"]["tasks"]
    assert all(t["train"]["n"] + t["held_out"]["n"] == 24 for t in plan)
    trials = sorted(p.name for p in (task / "unshrunk/trials/0.5").iterdir())
    assert trials == ["shapes.jsonl"]
