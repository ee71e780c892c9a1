"""The budget of training examples: every row sees as many, or says so."""

import json

import pytest

from llava_keeplora.compare import budget, compare, parse_table, write_table
from llava_keeplora.compare.budget import check_budgets, trained_examples
from llava_keeplora.compare.run_table import _check
from llava_keeplora.config import load_config, parse_config, read_config
from llava_keeplora.errors import ConfigError
from llava_keeplora_recipes import load_recipes


def refused(table) -> str:
    with pytest.raises(ConfigError) as error:
        _check(table, table.methods)
    return str(error.value)


def test_a_row_with_more_epochs_is_refused_with_both_numbers(make_table, tmp_path):
    # Two tasks of 24 examples each.
    methods = {"seq-lora": {"training": {"num_train_epochs": 3}}, "keeplora": {}, "o-lora": {}}
    assert refused(make_table(tmp_path / "table", methods=methods)) == (
        "on order I, 'keeplora' trains on 48 examples, but 'seq-lora' on 144, which is no equal budget; give "
        "all as many, or list rows openly with `other_budget: [seq-lora]`, and the table marks them."
    )
    table = make_table(tmp_path / "table", methods=methods, other_budget=["seq-lora"])
    _check(table, table.methods)


def test_steps_count_as_the_examples_that_they_see(make_table, tmp_path):
    # 24 examples in batches of 8: 6 steps of one task are two passes.
    methods = {"seq-lora": {"training": {"max_steps": 6}}, "keeplora": {"training": {"num_train_epochs": 2}}}
    table = make_table(tmp_path / "table", methods=methods)
    _check(table, table.methods)
    methods["seq-lora"]["training"]["max_steps"] = 5
    assert "'seq-lora' trains on 80 examples, but 'keeplora' on 96" in refused(
        make_table(tmp_path / "table", methods=methods)
    )


def test_bounds_have_the_budget_by_definition_and_replay_a_larger_one(make_table, tmp_path):
    methods = {"seq-lora": {}, "individual": {}, "joint": {}}
    table = make_table(tmp_path / "table", methods=methods)
    _check(table, table.methods)
    # With the second task's 24 examples, half as many of the first one's.
    replay = make_table(tmp_path / "table", methods={**methods, "replay": {"ratio": 0.5}})
    assert "'seq-lora' trains on 48 examples, but 'replay' on 60" in refused(replay)
    first = make_table(tmp_path / "table", methods={"replay": {}, "seq-lora": {}})
    assert "'seq-lora' trains on 48 examples, but 'replay' on 72" in refused(first)


def test_what_a_run_will_see_is_counted_from_its_settings(run_config, tmp_path):
    methods = {
        "joint": {},
        "replay": {"ratio": 1.0},
        "seq-lora": {"training": {"num_train_epochs": [1, 2, 0.5]}},
        "individual": {"training": {"num_train_epochs": 2}},
    }
    config = run_config(tmp_path / "run", methods=methods)
    # Half an epoch of 24 in batches of 8 is two steps.
    assert {label: trained_examples(config, label) for label in methods} == {
        "joint": 72,
        "replay": 24 + 48 + 48,
        "seq-lora": 24 + 48 + 16,
        "individual": 144,
    }


@pytest.mark.parametrize("labels", [["seq-lora", "self-distillation"], ["self-distillation", "seq-lora"]])
def test_the_own_answers_that_self_distillation_trains_on_are_of_its_budget(labels, llava_tree, tmp_path):
    tree = llava_tree(tmp_path / "run", methods=dict.fromkeys(labels, {}))
    table = parse_table(tree | {"seeds": [0]})
    with pytest.raises(ConfigError, match="'seq-lora' trains on 96 examples, but 'self-distillation' on 192"):
        check_budgets(table, table.methods, {})
    tree["methods"]["self-distillation"] = {"strength": 0.0}
    table = parse_table(tree | {"seeds": [0]})
    check_budgets(table, table.methods, {})


def test_every_caption_of_an_image_is_an_example(llava_tree, tmp_path):
    # 24 questions, 24 images with two captions each, 24 classes.
    config = parse_config(llava_tree(tmp_path / "run", methods={"joint": {}, "keeplora": {}}))
    assert {label: trained_examples(config, label) for label in ("joint", "keeplora")} == {
        "joint": 96,
        "keeplora": 96,
    }


def test_settings_that_are_tried_have_the_same_budget(make_table, tmp_path):
    settings = {
        "seq-lora": [{}, {"training": {"num_train_epochs": 2}}],
        "keeplora": [{}, {"training": {"learning_rate": 1e-3}}],
    }
    table = make_table(tmp_path / "table", tuning={"holdout": 0.5, "metric": "last", "settings": settings})
    assert (
        "on order I with tuning.holdout, 'seq-lora (setting 1)' trains on 24 examples, but 'seq-lora (setting "
        "2)' on 48" in refused(table)
    )


def test_other_budget_lists_methods_of_the_table():
    tree = {"sequence": "demo", "methods": {"seq-lora": {}, "replay": {}}}
    assert parse_table(tree | {"other_budget": ["replay"]}).other_budget == ("replay",)
    for value, sentence in (
        (
            ["replai"],
            "other_budget names 'replai', which the configuration does not have; did you mean 'replay'.",
        ),
        (
            "replay",
            "other_budget is 'replay', but it takes a list of methods; write, for instance, [replay].",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            parse_table(tree | {"other_budget": value})
        assert str(error.value) == sentence
    # A run may carry the list for the table that is made of it; a wrong label is an error there too.
    assert parse_config(tree | {"other_budget": ["replay"]}) == parse_config(tree)
    with pytest.raises(ConfigError, match="other_budget names 'replai'"):
        parse_config(tree | {"other_budget": ["replai"]})


BENCHMARKS = ["mtil-order1", "mtil-order2", "ucit", "mllm-dcl", "coin", "mllm-acl"]


@pytest.mark.parametrize(
    "name",
    [
        "coin",
        *(pytest.param(n, marks=pytest.mark.slow) for n in BENCHMARKS if n != "coin"),
    ],
)
def test_a_shipped_benchmark_starts_as_a_table(name, monkeypatch):
    def published(config, sizes):
        recipes = load_recipes(config.tasks)
        return [r.expected_sizes.get("train", 20_000 + 7_000 * i) for i, r in enumerate(recipes)]

    monkeypatch.setattr(budget, "_sizes", published)
    table = parse_table(read_config(name))
    check_budgets(table, table.methods, {})
    # A table on top of it leaves rows out without a word about their budget.
    labels = ["seq-lora", "replay"]
    own = parse_table({"base": name, "methods": {label: table.methods[label] for label in labels}})
    assert own.other_budget == ("replay",)
    assert not load_config(name, methods=["keeplora"]).expected.keys() - {"zero-shot", "keeplora"}


def test_a_listed_row_is_run_and_marked_in_every_form_of_the_table(make_table, tmp_path, started):
    methods = {"seq-lora": {}, "joint": {}, "replay": {"ratio": 0.5}}
    table = make_table(tmp_path / "table", methods=methods, other_budget=["replay"])
    text = write_table(table, compare(table))
    note = "Trained on another number of examples than the others: replay (1.25 times)."
    bounds = "Bounds, learned in no order and with Last alone: joint."
    assert f"seeds 0. {bounds} {note}\n" in text
    cells = {
        row[0]: row[-4:]
        for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
        if row[0] in methods and len(row) > 4
    }
    assert cells == {
        "seq-lora": ["48", "1.00", "0.00", "nothing"],
        "joint": ["48", "1.00", "0.00", "old examples"],
        "replay": ["60 (1.25 ×)", "1.25", "0.00", "old examples"],
    }
    out = table.output_dir
    assert note in (out / "report.html").read_text()
    assert r"60 (1.25 $\times$) & 1.25 & 0.00 & old examples \\" in (out / "table.tex").read_text()
    records = json.loads((out / "table.json").read_text())["I"]
    assert records["replay"]["examples"] == 60 and records["replay"]["needs"] == "old examples"
    assert records["joint"]["other_passes_of"] == {} and records["zero-shot"]["examples"] is None
