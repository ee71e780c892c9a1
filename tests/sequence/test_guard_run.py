"""A run with a guard: every task is judged, and one that breaks a limit is taken back without a trace."""

import dataclasses
import importlib
import json
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from llava_keeplora.adapters import load_deltas
from llava_keeplora.cli import main
from llava_keeplora.config import parse_config
from llava_keeplora.doctor import examine_run
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.export import export_run
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.guard import exit_code
from llava_keeplora.journal import Entry, Journal, rolled_back, shrunk
from llava_keeplora.planned_recipes import planned_tasks
from llava_keeplora.report.resources import read_needs
from llava_keeplora.report.run_report import read_costs, write_run_report
from llava_keeplora.run_folder import Stage
from llava_keeplora.saved_run import extended, load_run
from llava_keeplora.sequence import guarding, workspace
from llava_keeplora.sequence.fork import fork
from llava_keeplora.sequence.progress import Progress
from llava_keeplora.sequence.retry import put_back
from llava_keeplora.sequence.workspace import Workspace
from llava_keeplora.start.tasks import hold_out
from llava_keeplora_eval import Matrix
from llava_keeplora_recipes import load_recipe, load_split
from llava_keeplora_recipes.errors import RecipeError

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

    def build(folder: Path, tasks: list[int], bounds: tuple[str, ...] = (), **guard):
        tree = run_tree(folder, tasks=[str(tiny_tasks[i]) for i in tasks])
        tree["methods"] = {label: {} for label in ("keeplora", *bounds)}
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


@pytest.mark.slow
def test_stop_leaves_all_in_place_and_goes_on_when_told_to_warn(guarded, driven, breaks, tmp_path):
    breaks("stripes")
    folder = driven(guarded(tmp_path / "run", [0, 1, 2], on_failure="stop"))
    assert (folder / "keeplora/task-02-stripes/delta.safetensors").is_file()
    assert not list(folder.glob("keeplora/task-03-*")) and exit_code(folder) == 3
    driven(guarded(tmp_path / "run", [0, 1, 2], on_failure="warn"))
    assert (folder / "keeplora/task-03-corners/guard.json").is_file()


def test_a_watched_recipe_is_none_of_the_tasks(guarded, driven, tiny_tasks, tmp_path):
    with pytest.raises(ConfigError, match="watches 'colours', a task of the run"):
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
    bounds = ("individual", "joint")
    folder = driven(guarded(tmp_path / "run", [0, 1, 2], bounds, on_failure="rollback"))
    config = fork(folder, 2, tmp_path / "fork")
    assert [Path(task).stem for task in config.tasks] == ["colours", "corners"]
    # The bounds have learned it, and learn the others again.
    assert not any((tmp_path / "fork" / label).exists() for label in bounds)
    driven(config)
    never = driven(guarded(tmp_path / "never", [0, 2], bounds, on_failure="rollback"))
    for label in (*bounds, "keeplora"):
        matrix = f"{label}/matrix.json"
        assert (tmp_path / "fork" / matrix).read_text() == (never / matrix).read_text(), label
    for name in ("delta", "state"):
        path = f"keeplora/task-02-corners/{name}.safetensors"
        assert (tmp_path / "fork" / path).read_bytes() == (folder / path).read_bytes()
    # The task comes back with other settings, at the end.
    driven(extended(tmp_path / "fork", str(tiny_tasks[1]), {"learning_rate": 0.001}))
    assert (tmp_path / "fork/keeplora/aside/01-stripes/guard.json").is_file()
    assert not [found for found in examine_run(folder) if isinstance(found, Exception)]


@pytest.mark.slow
def test_an_update_that_breaks_a_limit_gets_smaller_and_nothing_later_knows_the_whole_one(
    guarded, driven, breaks, tmp_path, monkeypatch
):
    breaks("stripes", even_smaller=False)
    begun, init = [], Progress.__init__
    monkeypatch.setattr(
        Progress, "__init__", lambda self, *args, **how: begun.append(self) or init(self, *args, **how)
    )
    folder = driven(guarded(tmp_path / "run", [0, 1, 2], on_failure="shrink"))
    assert begun[-1].done == pytest.approx(begun[-1].total)  # The search and the stages after it are counted.
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
    write_run_report(folder)
    page = (folder / "report.html").read_text()
    assert "(with 0.9375 of its update)" in page and "what that costs: stripes scores" in page
    # What the training of the whole update took is counted once, and so is the smaller one's file.
    needs = read_needs(label)
    assert needs.training_passes == 1 and needs.inputs is not None
    assert read_costs(label)[Stage.TRAINED].seconds > 0
    # The held-out examples are in nobody's training.
    plan = json.loads((label / "journal.jsonl").read_text().splitlines()[0])["info"]["tasks"]
    assert all(t["train"]["n"] + t["held_out"]["n"] == 24 for t in plan)
    trials = sorted(p.name for p in (task / "unshrunk/trials/0.5").iterdir())
    assert trials == ["shapes.jsonl"]


@pytest.mark.slow
def test_a_llava_under_a_guard_keeps_a_share_of_full_and_low_rank_updates(
    llava_config, driven, breaks, mixed_tasks, tiny_tasks, tmp_path
):
    breaks("corners", even_smaller=False)
    tasks = [str(mixed_tasks[0]), str(mixed_tasks[2])]
    guard = {**WATCH, "watch": [str(tiny_tasks[0])], "old_tasks": {"max_drop": 100}, "on_failure": "shrink"}
    folder = driven(llava_config(tmp_path / "run", tasks=tasks, guard=guard))
    task = folder / "keeplora/task-02-corners"
    verdict = json.loads((task / "guard.json").read_text())
    limits = [(limit["of"], limit["task"]) for limit in verdict["limits"]]
    assert limits == [("old task", "questions"), ("watch task", "colours")]
    assert verdict["ship"] and (share := verdict["shrink"]["lambda"]) == 15 / 16
    whole, smaller = (load_deltas(place / "delta.safetensors") for place in (task / "unshrunk", task))
    assert {type(delta).__name__ for delta in smaller.values()} == {"Delta", "FullDelta"}
    for name, delta in smaller.items():
        for key, change in delta.changes().items():
            assert torch.allclose(change, whole[name].changes()[key] * share, rtol=1e-5, atol=1e-9)
    assert not [found for found in examine_run(folder) if isinstance(found, Exception)]


@pytest.mark.slow
@pytest.mark.parametrize("then", ["rollback", "shrink"])
def test_an_adopted_task_is_judged_as_a_trained_one(
    guarded, driven, breaks, tiny_clip, tiny_tasks, tmp_path, then
):
    folder = driven(guarded(tmp_path / "run", [0], on_failure=then))
    adapter = tmp_path / "adapter"
    peft_lora(tiny_clip).save_pretrained(adapter)
    breaks("stripes", even_smaller=False)
    driven(extended(folder, str(tiny_tasks[1]), source=str(adapter)))
    places = {"rollback": "aside/01-stripes", "shrink": "task-02-stripes"}
    record = json.loads((folder / "keeplora" / places[then] / "guard.json").read_text())
    assert exit_code(folder, "stripes") == (3 if then == "rollback" else 0)
    assert record["ship"] == (then == "shrink") and [r["of"] for r in record["limits"]] == ["watch task"]
    log = json.loads((folder / "keeplora" / places[then] / "train.json").read_text())
    assert log["adopted"]["source"] and log.get("shrunk") == (15 / 16 if then == "shrink" else None)
    # The next task goes on from there.
    driven(extended(folder, str(tiny_tasks[2])))
    index = 2 if then == "rollback" else 3
    assert (folder / f"keeplora/task-{index:02d}-corners/guard.json").is_file()
    assert not [found for found in examine_run(folder) if isinstance(found, Exception)]


def peft_lora(path: Path):
    """A LoRA with random A and B on a CLIP, as PEFT makes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPModel

    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    model = get_peft_model(CLIPModel.from_pretrained(path), LoraConfig(r=2, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.slow
def test_what_a_shrunk_run_exports_and_forks_is_the_smaller_update(
    guarded, driven, breaks, tiny_tasks, tmp_path
):
    breaks("stripes", even_smaller=False)
    folder = driven(guarded(tmp_path / "run", [0, 1], on_failure="shrink"))
    delta = (folder / "keeplora/task-02-stripes/delta.safetensors").read_bytes()
    fork(folder, 2, tmp_path / "fork")
    assert (tmp_path / "fork/keeplora/task-02-stripes/delta.safetensors").read_bytes() == delta
    for run in (folder, tmp_path / "fork"):
        driven(extended(run, str(tiny_tasks[2])))
    assert hashes(tmp_path / "fork", "corners") == hashes(folder, "corners")
    assert not [found for found in examine_run(tmp_path / "fork") if isinstance(found, Exception)]
    state = export_run(folder, "state", tmp_path / "state", at_task=2, base_id="user/name")
    assert next(Path(state.folder).glob("keeplora/task-02-stripes/delta.safetensors")).read_bytes() == delta
    export_run(folder, "adapter", tmp_path / "adapter", base_id="user/name")


@pytest.mark.slow
def test_a_task_that_was_rolled_back_is_tried_again_at_the_end_with_other_settings(
    guarded, driven, breaks, monkeypatch, tmp_path, tiny_tasks
):
    judge = guarding.judge
    breaks("stripes")
    folder = driven(guarded(tmp_path / "run", [0, 1, 2], on_failure="rollback"))
    retry = ["extend", str(folder), "--retry", "stripes"]
    assert main([*retry, "--learning-rate", "0.02"]) == 3
    assert [p.name for p in sorted((folder / "keeplora/aside").iterdir())] == ["01-stripes", "02-stripes"]
    monkeypatch.setattr(guarding, "judge", judge)
    assert main([*retry, "--learning-rate", "0.005"]) == 0 == exit_code(folder)
    assert main([*retry, "--learning-rate", "0.005"]) == 0  # Nothing is left to do.
    # It is the run that had the task at its end from the start.
    config = guarded(tmp_path / "other", [0, 2, 1], on_failure="rollback")
    rates = {"learning_rate": [0.01, 0.01, 0.005]}
    method = dataclasses.replace(config.methods["keeplora"], training=config.training | rates)
    other = driven(
        dataclasses.replace(config, methods={"keeplora": method}, training=config.training | rates)
    )
    assert hashes(folder, "stripes") == hashes(other, "stripes")
    assert (folder / "keeplora/matrix.json").read_text() == (other / "keeplora/matrix.json").read_text()
    verdicts = json.loads((folder / "guard.json").read_text())["methods"]["keeplora"]
    assert [(v["task"], v["ship"], "retried" in v) for v in verdicts][2:] == [
        ("stripes", False, True),
        ("stripes", False, True),
        ("stripes", True, False),
    ]
    assert not [found for found in examine_run(folder) if isinstance(found, Exception)]
    fork(folder, 3, tmp_path / "fork")
    assert not [found for found in examine_run(tmp_path / "fork") if isinstance(found, Exception)]


def test_a_kill_while_a_task_is_put_back_is_made_good_by_the_same_command(guarded, monkeypatch, tmp_path):
    folder, names = tmp_path / "run", ["colours", "stripes", "corners"]
    Workspace(guarded(folder, [0, 1, 2], on_failure="rollback")).claim()
    for label in ("zero-shot", "keeplora"):
        journal = Journal(folder / label / "journal.jsonl")
        journal.append(Entry(0, Stage.PLANNED, info={"tasks": [{"task": name} for name in names]}))
    gone = {"task": "stripes", "folder": "task-02-stripes", "aside": "aside/01-stripes"}
    journal.append(Entry(2, Stage.ROLLED_BACK, info={"rolled_back": gone}))
    whole, append = shutil.copytree(folder, tmp_path / "whole"), Journal.append
    put_back(load_run(whole), "stripes", {"learning_rate": 0.02})
    for fatal in (1, 2):  # Before each journal's entry; the configuration is written first.
        calls = iter(range(1, 9))

        def killed(self, entry, calls=calls, fatal=fatal):
            if next(calls) == fatal:
                raise KeyboardInterrupt
            append(self, entry)

        monkeypatch.setattr(Journal, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            put_back(load_run(folder), "stripes", {"learning_rate": 0.02})
    monkeypatch.setattr(Journal, "append", append)
    config = put_back(load_run(folder), "stripes", {"learning_rate": 0.02})
    assert [Path(task).stem for task in config.tasks] == ["colours", "corners", "stripes"]
    for name in ("identity.json", "keeplora/journal.jsonl", "zero-shot/journal.jsonl"):
        assert (folder / name).read_text() == (whole / name).read_text()
    plans = [planned_tasks(Journal(folder / label / "journal.jsonl")) for label in ("keeplora", "zero-shot")]
    assert [[record["task"] for record in plan] for plan in plans] == [["colours", "corners", "stripes"]] * 2
    with pytest.raises(RunError, match="'keeplora' has not rolled 'colours' back"):
        put_back(load_run(folder), "colours")
    with pytest.raises(RunError, match="has no task 'pets'"):
        put_back(load_run(folder), "pets")
    # Learned since, as another task has followed: its place stays.
    Workspace(load_run(folder).followed_by("digits", {"learning_rate": 0.01})).write()
    with pytest.raises(RunError, match="'keeplora' has not rolled 'stripes' back"):
        put_back(load_run(folder), "stripes")
    assert (folder / "keeplora/journal.jsonl").read_text() == (whole / "keeplora/journal.jsonl").read_text()


def test_a_single_task_is_put_back_and_a_kill_between_the_files_of_the_configuration_is_made_good(
    guarded, monkeypatch, tmp_path
):
    folder = tmp_path / "run"
    Workspace(guarded(folder, [1], on_failure="rollback")).claim()
    gone = {"task": "stripes", "folder": "task-01-stripes", "aside": "aside/01-stripes"}
    journal = Journal(folder / "keeplora/journal.jsonl")
    journal.append(Entry(0, Stage.PLANNED, info={"tasks": [{"task": "stripes"}]}))
    journal.append(Entry(1, Stage.ROLLED_BACK, info={"rolled_back": gone}))
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "dump_config", lambda config: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            put_back(load_run(folder), "stripes", {"learning_rate": 0.02})
    config = put_back(load_run(folder), "stripes", {"learning_rate": 0.02})
    assert config.training["learning_rate"] == [0.02] and Workspace(load_run(folder)).check() is None
    assert not rolled_back(Journal(folder / "keeplora/journal.jsonl").entries)


def test_the_main_process_puts_a_task_back_and_the_others_take_its_configuration(
    guarded, monkeypatch, tmp_path
):
    """Another process would find the journals that the main one has rewritten."""
    config, module = guarded(tmp_path / "run", [0, 1]), importlib.import_module("llava_keeplora.run")
    monkeypatch.setattr(module, "processes", lambda config: nullcontext(False))
    monkeypatch.setattr(
        module, "all_gather_object", lambda value: [pickle.loads(pickle.dumps(config)), value]
    )
    monkeypatch.setattr(module, "run", lambda config, objects: {})
    run = module.Run(config)
    run.retry("stripes")
    assert run.config == config


def test_where_nothing_can_be_held_out_for_shrinking_the_setting_that_asks_for_it_is_named(tiny_tasks):
    data = load_split(load_recipe(str(tiny_tasks[0])), "train")
    firsts = data.take({label: row for row, label in enumerate(data.labels)}.values())
    with pytest.raises(RecipeError, match="guard.on_failure is 'shrink', .* one example per class.*rollback"):
        hold_out(firsts, 0.1)
    assert hold_out(firsts, 0.0) == (firsts, None)
