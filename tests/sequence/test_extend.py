"""A task that is appended to a run leaves what it would have left in the list from the start."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.journal import Journal
from llava_keeplora.saved_run import extended, load_run
from llava_keeplora_eval.files import file_hash
from llava_keeplora_recipes.errors import RecipeError


@pytest.fixture
def copied(two_tasks_run, tmp_path):
    """A copy of the run on two tasks in another place."""
    return Path(shutil.copytree(two_tasks_run, tmp_path / "elsewhere"))


def test_an_extended_run_leaves_the_files_of_one_that_had_the_task_from_the_start(
    copied, three_tasks_run, outcome, drive, tiny_tasks
):
    drive(extended(copied, str(tiny_tasks[2])))
    found, expected = outcome(copied), outcome(three_tasks_run)
    assert found == expected
    for name in (
        "matrix.json",
        "task-03-corners/delta.safetensors",
        "task-01-colours/predictions/corners.jsonl",
        "task-03-corners/state.safetensors",
    ):
        assert f"keeplora/{name}" in found


def test_an_extension_appends_to_the_journal_and_learns_nothing_twice(copied, drive, tiny_tasks):
    before = (copied / "keeplora/journal.jsonl").read_bytes()
    drive(extended(copied, str(tiny_tasks[2])))
    after = (copied / "keeplora/journal.jsonl").read_bytes()
    assert after.startswith(before)
    added = [(e["task"], e["stage"]) for e in map(json.loads, after[len(before) :].splitlines())]
    third = [
        (3, stage) for stage in ("PLANNED", "PREPARED", "TRAINED", "CONSOLIDATED", "EVALUATED", "CLOSED")
    ]
    assert added == [(0, "PLANNED"), (0, "EVALUATED"), (1, "EVALUATED"), (2, "EVALUATED"), *third]


@pytest.mark.slow
def test_a_run_on_llava_is_extended_alike(llava_tree, mixed_tasks, driven, outcome, tmp_path):
    captions, corners = map(str, mixed_tasks[1:])
    whole = driven(parse_config(llava_tree(tmp_path / "whole", tasks=[captions, corners])))
    part = driven(parse_config(llava_tree(tmp_path / "part", tasks=[captions])))
    driven(extended(part, corners))
    assert outcome(part) == outcome(whole)


@pytest.mark.slow
def test_a_task_appended_in_the_configuration_extends_the_run_too(
    copied, run_config, three_tasks_run, drive, outcome
):
    drive(run_config(copied))
    assert outcome(copied) == outcome(three_tasks_run)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_extension_stopped_at_every_stage_ends_with_the_same_files(
    copied, three_tasks_run, drive, outcome, stopped, stop_at_every_stage, tiny_tasks, when
):
    stop_at_every_stage(when)
    for starts in range(1, 100):
        try:
            drive(extended(copied, str(tiny_tasks[2])))
            break
        except stopped:
            continue
    assert starts == 1 + 2 + 2 * 10, "every stage of the extension was a stop"
    assert outcome(copied) == outcome(three_tasks_run)


@pytest.mark.slow
def test_a_run_is_extended_on_a_machine_that_has_neither_its_recipes_nor_its_folder(
    own_tasks, run_config, drive, outcome, three_tasks_run, tmp_path
):
    """The recipes go with the run, those that it extends included; the data come from --data-root."""
    base = own_tasks[0].with_name("base.yaml")
    own_tasks[0].rename(base)
    own_tasks[0].write_text(yaml.safe_dump({"extends": "base.yaml", "licence": "CC0-1.0"}))
    drive(run_config(tmp_path / "here", tasks=[str(path) for path in own_tasks[:2]]))
    there, data = tmp_path / "there", tmp_path / "data"
    shutil.move(tmp_path / "here", there)
    shutil.copytree(own_tasks[0].parent, data)
    shutil.rmtree(own_tasks[0].parent)
    with pytest.raises(
        RecipeError,
        match="the data of 'colours' is not there: .*; give the folder that holds it with --data-root",
    ):
        drive(extended(there, str(data / "corners.yaml")))
    drive(extended(there, str(data / "corners.yaml"), data_root=str(data)))
    found, expected = outcome(there), outcome(three_tasks_run)
    recipes = {f"recipes/{name}.yaml" for name in ("colours", "stripes", "corners")}
    assert {k: v for k, v in found.items() if k not in recipes} == {
        k: v for k, v in expected.items() if k not in recipes
    }
    assert recipes <= {*found}


@pytest.mark.slow
def test_a_run_that_was_extended_is_extended_again(
    run_config, driven, three_tasks_run, outcome, tiny_tasks, tmp_path
):
    run = driven(run_config(tmp_path / "run", tasks=[str(tiny_tasks[0])]))
    for task in tiny_tasks[1:]:
        driven(extended(run, str(task)))
    assert outcome(run) == outcome(three_tasks_run)


@pytest.mark.slow
def test_a_run_extended_before_its_end_ends_with_the_same_files(
    run_config, drive, stopped, monkeypatch, three_tasks_run, outcome, tiny_tasks, tmp_path
):
    config = run_config(tmp_path / "run", tasks=[str(path) for path in tiny_tasks[:2]])
    append = Journal.append

    def stop(self, entry):
        append(self, entry)
        if self.path.parent.name == "keeplora" and (entry.task, entry.stage) == (2, "TRAINED"):
            raise stopped

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stop)
        with pytest.raises(stopped):
            drive(config)
    drive(extended(tmp_path / "run", str(tiny_tasks[2])))
    assert outcome(tmp_path / "run") == outcome(three_tasks_run)


def test_extending_by_the_last_task_again_changes_nothing(copied, drive, outcome, tiny_tasks, monkeypatch):
    before = outcome(copied)
    monkeypatch.setattr(Journal, "append", lambda *args: pytest.fail("a stage ran again"))
    drive(extended(copied, str(tiny_tasks[1])))
    assert {k: v for k, v in outcome(copied).items() if k != "results.json"} == {
        k: v for k, v in before.items() if k != "results.json"
    }


def test_a_task_learned_before_is_refused(copied, drive, tiny_tasks):
    with pytest.raises(RecipeError, match="task 'colours' is in the sequence 2 times; name each task once"):
        drive(extended(copied, str(tiny_tasks[0])))


def test_a_refused_extension_leaves_the_run_as_it_was(copied, drive, tiny_tasks, tmp_path):
    before = {
        path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and path.name != ".lock"
    }
    facts = yaml.safe_load(tiny_tasks[2].read_text())
    (tmp_path / "corners.yaml").write_text(yaml.safe_dump(facts))
    with pytest.raises(RecipeError, match="the data of 'corners' is not there"):
        drive(extended(copied, str(tmp_path / "corners.yaml")))
    with pytest.raises(RunError, match="holds a run with another configuration .*learning_rate"):
        drive(extended(copied, str(tiny_tasks[2]), overrides=["training.learning_rate=1"]))
    assert {
        path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and path.name != ".lock"
    } == before


def test_what_a_machine_needs_may_change_with_an_extension(
    copied, drive, outcome, three_tasks_run, tiny_tasks
):
    drive(
        extended(
            copied,
            str(tiny_tasks[2]),
            overrides=[
                "evaluation.batch_size=3",
                "training.per_device_train_batch_size=4",
                "training.gradient_accumulation_steps=2",
            ],
        )
    )
    assert set(outcome(copied)) == set(outcome(three_tasks_run))


def test_a_kept_configuration_is_read_back_as_it_was(run_config, drive, tmp_path, tiny_tasks):
    changes = {
        "tasks": [str(tiny_tasks[0])],
        "training": {"num_train_epochs": [1]},
        "methods": {
            "a": {
                "method": "keeplora",
                "gradient_fraction": 0.5,
                "parts": {"text": {"rank": 3}},
                "training": {"learning_rate": 0.02},
            }
        },
    }
    config = run_config(tmp_path / "run", **changes)
    drive(config)
    assert load_run(tmp_path / "run") == config
    assert (
        load_run(tmp_path / "run", ["training.weight_decay=0.5"]).methods["a"].training["weight_decay"] == 0.5
    )


@pytest.mark.slow
def test_a_run_with_epochs_per_task_asks_for_those_of_the_new_one(run_config, drive, tmp_path, tiny_tasks):
    tasks = [str(path) for path in tiny_tasks]
    drive(
        run_config(
            tmp_path / "run", tasks=tasks[:1], methods={"seq-lora": {}}, training={"num_train_epochs": [1]}
        )
    )
    with pytest.raises(
        ConfigError,
        match="training.num_train_epochs lists a number for each task, but has none for the new one; give it with --epochs",
    ):
        extended(tmp_path / "run", tasks[1])
    drive(extended(tmp_path / "run", tasks[1], {"num_train_epochs": 2}))
    steps = [
        json.loads(path.read_text())["steps"]
        for path in sorted((tmp_path / "run/seq-lora").glob("task-*/train.json"))
    ]
    assert steps == [3, 6]
    with pytest.raises(RunError, match=r"training.num_train_epochs: \[1.0, 2.0\] → 1.0"):
        drive(run_config(tmp_path / "run", tasks=tasks[:2], methods={"seq-lora": {}}))


@pytest.mark.slow
def test_every_task_learns_at_its_own_rate_and_a_new_one_asks_for_its_own(
    run_config, drive, tmp_path, tiny_tasks
):
    tasks, rates = [str(path) for path in tiny_tasks], [0.02, 0.005, 0.01]
    training = {"lr_scheduler_type": "constant", "logging_steps": 1}
    drive(
        run_config(
            tmp_path / "run",
            tasks=tasks[:2],
            methods={"seq-lora": {}},
            training=training | {"learning_rate": rates[:2]},
        )
    )
    with pytest.raises(
        ConfigError,
        match="training.learning_rate lists a number for each task, but has none for the new one; give it with --learning-rate",
    ):
        extended(tmp_path / "run", tasks[2])
    drive(extended(tmp_path / "run", tasks[2], {"learning_rate": rates[2]}))
    logs = [
        json.loads(path.read_text())["history"]
        for path in sorted((tmp_path / "run/seq-lora").glob("task-*/train.json"))
    ]
    assert [{one["learning_rate"] for one in log if "learning_rate" in one} for log in logs] == [
        {rate} for rate in rates
    ]
    drive(
        run_config(
            tmp_path / "whole",
            tasks=tasks,
            methods={"seq-lora": {}},
            training=training | {"learning_rate": rates},
        )
    )
    deltas = [
        [file_hash(path) for path in sorted((tmp_path / name / "seq-lora").glob("task-*/delta.safetensors"))]
        for name in ("run", "whole")
    ]
    assert deltas[0] == deltas[1] and len(set(deltas[0])) == 3


@pytest.mark.parametrize(
    "rates",
    [{}, *(pytest.param({"learning_rate": rate}, marks=pytest.mark.slow) for rate in (0.02, [0.02]))],
)
def test_a_new_task_has_its_own_rate_also_where_a_method_or_nothing_sets_the_others(
    run_tree, drive, tmp_path, tiny_tasks, rates
):
    tree = run_tree(tmp_path / "run", tasks=[str(tiny_tasks[0])], methods={"seq-lora": {"training": rates}})
    del tree["training"]["learning_rate"]
    drive(parse_config(tree))
    identity = json.loads((tmp_path / "run/identity.json").read_text())
    if not rates:  # As an earlier version wrote it.
        for section in (identity, *identity["methods"].values()):
            section["training"].pop("learning_rate")
        (tmp_path / "run/identity.json").write_text(json.dumps(identity))
    drive(parse_config(tree))
    drive(extended(tmp_path / "run", str(tiny_tasks[1]), {"learning_rate": 0.01}))
    assert load_run(tmp_path / "run").trainings("seq-lora")[1]["learning_rate"] == 0.01
    assert load_run(tmp_path / "run").trainings("seq-lora")[0]["learning_rate"] == (0.02 if rates else 5e-5)


def test_a_task_taken_out_or_put_in_between_is_refused_with_the_difference(
    copied, run_config, drive, tiny_tasks
):
    first, second, third = map(str, tiny_tasks)
    with pytest.raises(RunError, match=r"tasks: \['colours', 'stripes'\] → \['colours'\]"):
        drive(run_config(copied, tasks=[first]))
    with pytest.raises(RunError, match=r"tasks\[1\]: 'stripes' → 'corners'"):
        drive(run_config(copied, tasks=[first, third, second]))
