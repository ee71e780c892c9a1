"""Rows that are read with one prompt or with averaged test prompts."""

import json

import pytest
import yaml

from llava_keeplora.config import AVERAGED, ONE, load_config, parse_config
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.export import export_run, import_state
from llava_keeplora.saved_run import load_run, run_identity
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.models import load_clip
from llava_keeplora_eval.predictors import ClipPredictor
from llava_keeplora_recipes import RecipeError, load_recipe, load_split

TEMPLATES = ["blue {c}", "red {c}"]


@pytest.fixture
def with_templates(own_tasks):
    """A task with test prompts."""
    facts = yaml.safe_load(own_tasks[0].read_text()) | {"test_prompts": TEMPLATES}
    own_tasks[0].write_text(yaml.safe_dump(facts))
    return [str(path) for path in own_tasks[:1]]


@pytest.fixture
def tree(run_tree, tmp_path, with_templates):
    methods = {"one": {"method": "seq-lora"}, "averaged": {"method": "seq-lora", "test_prompts": AVERAGED}}
    methods["again"] = {**methods["averaged"], "training": {"learning_rate": 0.0}}
    return run_tree(
        tmp_path / "run",
        tasks=with_templates,
        methods=methods,
        training={"max_steps": 1, "num_train_epochs": None},
    )


def test_each_row_is_read_with_its_own_prompts_from_the_untouched_model_on(tree, drive, tiny_clip, tmp_path):
    results, run = drive(parse_config(tree)), tmp_path / "run"
    data = load_split(load_recipe(tree["tasks"][0]), "test")
    examples = [data[i] for i in range(len(data))]
    plain = ClipPredictor(*load_clip(str(tiny_clip)), data.recipe)
    answers = {ONE: plain.predict(examples), AVERAGED: plain.with_test_prompts().predict(examples)}
    assert answers[ONE] != answers[AVERAGED], "else the test would show nothing"
    share = {
        how: 100 * sum(a == b for a, [b] in zip(said, data.answers)) / len(said)
        for how, said in answers.items()
    }
    for label, how in {"zero-shot": ONE, "one": ONE, "averaged": AVERAGED, "again": AVERAGED}.items():
        assert results[label].zero_shot[0] == pytest.approx(share[how]), label
    assert results["again"].rows[0][0] == pytest.approx(share[AVERAGED]), "trained at a rate of zero"
    # Measured once for all rows that are read alike; kept with what it was asked for.
    assert [
        (run / label / "task-00-base/predictions").is_dir()
        for label in ("zero-shot", "one", "averaged", "again")
    ] == [True, False, True, False]
    plans = {
        label: json.loads((run / label / "journal.jsonl").read_text().splitlines()[0])
        for label in ("one", "averaged")
    }
    assert "test_prompts" not in json.dumps(plans["one"]) and json.dumps(TEMPLATES) in json.dumps(
        plans["averaged"]
    )
    # It is what the run is: it opens again with it, and with nothing else.
    assert load_run(run) == parse_config(tree)
    with pytest.raises(
        RunError, match="another configuration .*methods.averaged.test_prompts: 'averaged' → None"
    ):
        drive(load_run(run, ["methods.averaged.test_prompts=one"]))
    facts = yaml.safe_load(open(tree["tasks"][0])) | {"test_prompts": TEMPLATES[:1]}
    open(tree["tasks"][0], "w").write(yaml.safe_dump(facts))
    with pytest.raises(RunError, match="'colours' has changed since .*averaged was planned"):
        drive(load_run(run))


def test_an_exported_state_is_read_as_its_row_was(tree, drive, tiny_clip, tmp_path, monkeypatch):
    tree["methods"] = {"averaged": {**tree["methods"]["averaged"], "random_resized_crop": [0.9, 1.0]}}
    drive(parse_config(tree))
    monkeypatch.setattr(
        "llava_keeplora.export.run_export.verify_export",
        lambda folder, form, base, batch, meant, layers: (meant, meant),
    )
    export_run(tmp_path / "run", "state", tmp_path / "state", base_id="you/tiny-base")
    config = load_config(str(import_state(str(tmp_path / "state"), tmp_path / "again", base=str(tiny_clip))))
    assert config.methods["averaged"].test_prompts == AVERAGED and config.methods[
        "averaged"
    ].random_resized_crop == (0.9, 1.0)
    assert load_run(tmp_path / "again").methods == config.methods


def test_the_run_says_it_for_all_rows_and_a_row_for_itself(tree):
    config = parse_config(
        tree
        | {
            "evaluation": {"test_prompts": AVERAGED},
            "methods": {"seq-lora": {}, "keeplora": {"test_prompts": ONE}},
        }
    )
    assert {label: method.test_prompts for label, method in config.methods.items()} == {
        "seq-lora": AVERAGED,
        "keeplora": ONE,
    }
    assert [config.first_alike(label) for label in ("zero-shot", "seq-lora", "keeplora")] == [
        "zero-shot",
        "zero-shot",
        "keeplora",
    ]
    assert run_identity(config)["evaluation"]["test_prompts"] == AVERAGED


def test_a_run_without_a_choice_has_the_identity_that_it_always_had(tree):
    del tree["methods"]["averaged"], tree["methods"]["again"]
    assert "test_prompts" not in json.dumps(run_identity(parse_config(tree)))
    recipe = load_recipe(tree["tasks"][0])
    facts = yaml.safe_load(open(tree["tasks"][0]))
    del facts["test_prompts"]
    open(tree["tasks"][0], "w").write(yaml.safe_dump(facts))
    assert load_recipe(tree["tasks"][0]).fingerprint == recipe.fingerprint


@pytest.mark.parametrize("where", ["evaluation", "methods.one"])
def test_another_word_is_refused(tree, where):
    with pytest.raises(ConfigError, match=f"{where}.test_prompts must be 'one' or 'averaged' .got 'all'"):
        (tree["methods"]["one"] if where != "evaluation" else tree.setdefault("evaluation", {}))[
            "test_prompts"
        ] = "all"
        parse_config(tree)


def test_a_test_prompt_that_is_too_long_is_named_before_anything_is_computed(tree, drive):
    facts = yaml.safe_load(open(tree["tasks"][0])) | {"test_prompts": ["the {c} " * 80]}
    open(tree["tasks"][0], "w").write(yaml.safe_dump(facts))
    with pytest.raises(EvalError, match="tokens"):
        drive(parse_config(tree))


def test_a_model_that_writes_its_answers_has_no_features_to_average(
    run_tree, tiny_llava, mixed_tasks, tmp_path, drive
):
    tree = run_tree(
        tmp_path / "run",
        tasks=[str(mixed_tasks[0])],
        model={"name_or_path": str(tiny_llava)},
        parts={"language": {"rank": 2}, "vision": None, "text": None},
        methods={"seq-lora": {"test_prompts": AVERAGED}},
    )
    with pytest.raises(
        ConfigError, match="methods.seq-lora.test_prompts is 'averaged', which averages .* is a llava"
    ):
        drive(parse_config(tree))


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (["a photo"], "'a photo', which has no place for the class"),
        ([3], "prompt 3, which"),
        (["{c}", "{c}"], "'{c}' twice, which would count double"),
        ("{c}", "a list"),
    ],
)
def test_templates_that_cannot_be_meant_are_refused(own_tasks, templates, message):
    own_tasks[0].write_text(
        yaml.safe_dump(yaml.safe_load(own_tasks[0].read_text()) | {"test_prompts": templates})
    )
    with pytest.raises(RecipeError, match=message):
        load_recipe(own_tasks[0])


def test_mtils_recipes_have_as_many_as_zscls_code():
    counts = {
        task.split("/")[1]: len(load_recipe(task).test_prompts) for task in load_config("mtil-order1").tasks
    }
    some = {
        "aircraft": 2,
        "caltech101": 34,
        "cifar100": 18,
        "dtd": 8,
        "eurosat": 3,
        "stanfordcars": 9,
        "sun397": 2,
    }
    assert counts == some | dict.fromkeys(("flowers", "food", "mnist", "oxfordpet"), 0)
