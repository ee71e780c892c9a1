"""A table's file: what it inherits, and a sentence for everything that is wrong with it."""

import json

import pytest
import yaml

from llava_keeplora.compare import compare, load_table, parse_table
from llava_keeplora.compare.jobs import table_jobs, tuning_jobs
from llava_keeplora.config import list_configs, list_tables, parse_config, read_config
from llava_keeplora.errors import ConfigError, RunError, UserError
from llava_keeplora_recipes import RecipeError

FOUR = [{"training": {"learning_rate": rate}} for rate in (1e-4, 5e-4, 1e-3, 2e-3)]


def refused(**tree) -> str:
    with pytest.raises(UserError) as error:
        parse_table({"sequence": "demo", "methods": {"seq-lora": {}, "keeplora": {}}, **tree})
    return str(error.value)


def test_a_runs_configuration_is_a_table_of_its_order_and_seed():
    table = load_table("demo", ["seed=4"], data_root="data", output_dir="out")
    (seq, keep) = table_jobs(table, table.methods)["I"]
    config = parse_config(keep.tree)
    assert (
        str(seq.folder) == "out/I/seed-4/seq-lora"
        and config.seed == 4
        and config.data.root == "data"
        and config.base_cache == "out/base-cache"
    )
    assert (
        list(config.methods) == ["keeplora"]
        and config.methods["keeplora"].options["gradient_fraction"] == 0.25
    )
    assert config.tasks == parse_config(read_config("demo")).tasks


def test_a_table_changes_what_its_base_sets_and_has_its_own_methods(tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "base": "real",
                "seeds": [0, 1],
                "orders": {"I": ["digits", "glyphs"], "II": {"tasks": "demo", "seeds": [7]}},
                "methods": {"zero-shot": {}, "o-lora": {"lambda1": 1.0}},
                "training": {"num_train_epochs": 1},
                "parts": {"text": {"rank": 4}},
            }
        )
    )
    table = load_table(str(path), ["training.learning_rate=0.5"])
    jobs = table_jobs(table, table.methods)
    assert [str(job.folder) for order in jobs.values() for job in order] == [
        "runs/real/I/seed-0/o-lora",
        "runs/real/I/seed-1/o-lora",
        "runs/real/II/seed-7/o-lora",
    ]
    config = parse_config(jobs["I"][1].tree)
    assert (
        config.tasks == ("digits", "glyphs")
        and config.training["learning_rate"] == 0.5
        and config.training["num_train_epochs"] == 1
    )
    assert (
        config.training["weight_decay"] == 0.01
        and config.parts["text"].rank == 4
        and config.parts["vision"].rank == 16
    )
    assert len(parse_config(jobs["II"][0].tree).tasks) == 7


def test_an_order_has_its_own_epochs_and_without_seeds_only_settings_are_tried_on_it():
    orders = {
        "I": {"tasks": ["digits", "glyphs"], "epochs": [0.5, 2]},
        "small": {"tasks": ["glyphs"], "epochs": [3], "seeds": []},
    }
    tuning = {"order": "small", "metric": "last", "settings": {"seq-lora": FOUR}}
    table = parse_table(
        {
            "orders": orders,
            "methods": {"seq-lora": {}},
            "training": {"num_train_epochs": [1, 1]},
            "seeds": [0, 1],
            "tuning": tuning,
        }
    )
    jobs, tried = table_jobs(table, table.methods), tuning_jobs(table)["seq-lora"]

    def epochs(jobs):
        return [
            [one["num_train_epochs"] for one in parse_config(job.tree).trainings("seq-lora")] for job in jobs
        ]

    assert epochs(jobs["I"]) == [[0.5, 2]] * 2 and jobs["small"] == []
    assert epochs(tried) == [[3]] * 4 and parse_config(tried[0].tree).tasks == ("glyphs",)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sedes": [1]}, "unknown key 'sedes'; did you mean 'seeds'."),
        (
            {"seeds": [0, 0]},
            "seeds is [0, 0], but it takes a list of different whole numbers; write, for instance, [0, 1, 2].",
        ),
        (
            {"seeds": 3},
            "seeds is 3, but it takes a list of different whole numbers; write, for instance, [0, 1, 2].",
        ),
        (
            {"base": {"seed": 1}},
            "base is {'seed': 1}, which is no name; name a configuration or a YAML file, and write a run's keys into the table itself.",
        ),
        (
            {"base": "reel"},
            "there is no configuration 'reel', neither as a file nor among the shipped ones; did you mean 'real'.",
        ),
        (
            {"orders": {}},
            "orders has the names [], but a table has one order or more, each with a name of its own; leave `orders` out for a single one.",
        ),
        (
            {"orders": {1: "demo", "1": "demo"}},
            "orders has the names [1, '1'], but a table has one order or more, each with a name of its own; leave `orders` out for a single one.",
        ),
        ({"output_dir": 3}, "output_dir is 3, which is no folder; write, for instance, runs/table."),
        (
            {"orders": {"report.html": "demo"}},
            "orders has the name 'report.html', which cannot be a folder of the table; use letters, digits, '-', '_', '.' and '+'.",
        ),
        (
            {"orders": {"tuning": "demo"}},
            "orders has the name 'tuning', which cannot be a folder of the table; use letters, digits, '-', '_', '.' and '+'.",
        ),
        ({"orders": {"I": {"task": ["digits"]}}}, "unknown key 'orders.I.task'; did you mean 'tasks'."),
        (
            {"orders": {"I": {"seeds": [1]}}},
            "orders.I is {'seeds': [1]}, which is no order of tasks; name a sequence, or list the tasks.",
        ),
        (
            {"orders": {"I": {"tasks": "demo", "seeds": []}}},
            "orders.I has no seeds, and no settings are tried on it; give it a seed, or name it in tuning.order.",
        ),
        (
            {
                "orders": {"I": {"tasks": ["digits"], "epochs": [2]}},
                "methods": {"seq-lora": {"training": {"num_train_epochs": 3}}},
            },
            "a method has training.num_train_epochs, and orders.I.epochs sets them for all methods; leave out one of them.",
        ),
        (
            {"orders": {"I": {"tasks": "demo", "epochs": 2}}},
            "orders.I.epochs is 2, but it takes a positive number for each task; write, for instance, [1, 3, 0.5].",
        ),
        (
            {"orders": {"I": {"tasks": "demo", "sequence": "real-order1"}}},
            "orders.I is {'tasks': 'demo', 'sequence': 'real-order1'}, which is no order of tasks; name a sequence, or list the tasks.",
        ),
        (
            {"orders": {"I": "demo", "II": ["digits", "glyphs"]}, "training": {"num_train_epochs": [1, 2]}},
            "training.num_train_epochs lists a number for each task, and the table has 2 orders of them; "
            "give one number, or each order its own `epochs`.",
        ),
        (
            {
                "orders": {"I": "demo", "II": ["digits", "glyphs"]},
                "methods": {"seq-lora": {"training": {"learning_rate": [1, 2]}}},
            },
            "training.learning_rate lists a number for each task, and the table has 2 orders of them; give one number.",
        ),
        (
            {"tuning": {"settings": {"seq-lora": FOUR, "keeplora": FOUR[:3]}}},
            "tuning.settings has 4 settings for 'seq-lora' and 3 for 'keeplora', which is no equal budget; "
            "give every method as many, or write `keeplora: []` where there is nothing to tune.",
        ),
        (
            {"tuning": {"settings": {"seq-lora": FOUR}}},
            "tuning.settings.keeplora is None, but it takes a list of settings; list them, or write `keeplora: []` to take it as it is.",
        ),
        (
            {"tuning": {"settings": {"seq-lara": FOUR}}},
            "tuning.settings names 'seq-lara', which the table does not have; did you mean 'seq-lora'.",
        ),
        (
            {"tuning": {"order": "II"}},
            "tuning.order is 'II', which the table does not have; did you mean 'I'.",
        ),
        (
            {"tuning": {"metric": "last+forgetting"}},
            "tuning.metric is 'last+forgetting'; valid names are average, last, transfer, or a sum of them such as transfer+last.",
        ),
        (
            {"tuning": {"metric": "average+average"}},
            "tuning.metric is 'average+average', which names one twice; name each once.",
        ),
        (
            {"tuning": {"settings": {"seq-lora": FOUR, "keeplora": [*FOUR[:3], FOUR[0]]}}},
            f"tuning.settings.keeplora has {FOUR[0]} twice, which are no two settings tried; "
            "write other settings in the place of one.",
        ),
        (
            {"tuning": {"split": "test"}},
            "unknown key 'tuning.split'; valid names are holdout, metric, order, seed, settings.",
        ),
        (
            {"tuning": {"holdout": 0}},
            "tuning.holdout is 0.0, but settings are chosen on a part of the training data; set it to, say, 0.1.",
        ),
        (
            {"data": {"holdout": 0.1}, "tuning": {"settings": {}}},
            "data.holdout is set, so that the table itself would be scored on what its settings are chosen on; leave it out; tuning.holdout is enough.",
        ),
    ],
)
def test_what_is_wrong_is_reported_in_a_sentence(changes, sentence):
    assert refused(**changes) == sentence


def test_a_method_with_nothing_to_tune_is_taken_as_it_is():
    table = parse_table(
        {
            "sequence": "demo",
            "methods": {"seq-lora": {}, "keeplora": {}},
            "tuning": {"settings": {"seq-lora": FOUR, "keeplora": []}},
        }
    )
    assert {label: len(jobs) for label, jobs in tuning_jobs(table).items()} == {"seq-lora": 4, "keeplora": 0}


def test_a_mistake_of_any_run_is_reported_before_the_first_one_starts(started, tmp_path, make_table):
    settings = {"seq-lora": [{}, {"training": {"learnin_rate": 1}}], "keeplora": [{}, {}]}
    with pytest.raises(
        ConfigError,
        match="^tuning.settings.seq-lora, the setting number 2: methods.seq-lora.training.learnin_rate is not an argument",
    ):
        compare(make_table(tmp_path / "table", tuning={"settings": settings}))
    with pytest.raises(UserError, match="there is no recipe 'digitz'; did you mean 'digits'"):
        compare(make_table(tmp_path / "table", orders={"I": ["digits"], "II": ["digitz"]}))
    with pytest.raises(ConfigError, match="tuning.metric is 'transfer', and one task alone has no transfer"):
        compare(
            make_table(
                tmp_path / "table",
                tasks=["digits"],
                tuning={"metric": "transfer", "settings": {"seq-lora": [{}], "keeplora": [{}]}},
            )
        )
    with pytest.raises(RecipeError, match="task 'digits' is in the sequence 2 times"):
        compare(make_table(tmp_path / "table", orders={"I": ["digits"], "II": ["digits", "digits"]}))
    with pytest.raises(
        ConfigError, match="the configuration has no method 'keeplor'; did you mean 'keeplora'"
    ):
        compare(make_table(tmp_path / "table"), labels=["keeplor"])
    assert started == [] and not (tmp_path / "table").exists()


def test_a_runs_folder_is_no_tables(tmp_path, make_table):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(RunError) as error:
        compare(make_table(tmp_path / "run"))
    assert (
        str(error.value)
        == f"{tmp_path / 'run'} is a run's folder, and a table has many runs; choose another one with --output-dir."
    )


def test_a_folder_that_cannot_be_made_is_reported(tmp_path, make_table):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError) as error:
        compare(make_table(tmp_path / "file/table"))
    assert (
        str(error.value)
        == f"the table's folder {tmp_path / 'file/table'} cannot be written to (Not a directory); choose another one with --output-dir."
    )


def test_a_run_refuses_a_table():
    with pytest.raises(
        ConfigError,
        match="the key 'seeds' makes this a table of several runs; run it with `llava-keeplora compare`",
    ):
        parse_config({"sequence": "demo", "seeds": [0]})


def test_every_shipped_configuration_is_a_table_whose_runs_are_valid():
    for name in (*list_configs(), *list_tables()):
        table = load_table(name)
        jobs = [
            job
            for made in (table_jobs(table, table.methods), tuning_jobs(table))
            for row in made.values()
            for job in row
        ]
        assert jobs and all(
            json.dumps(job.tree) and parse_config(job.tree).methods for job in jobs[:: max(1, len(jobs) // 8)]
        )


def test_a_table_without_methods_is_refused(tmp_path):
    with pytest.raises(UserError, match="no method of the table learns anything, so there is nothing to run"):
        compare(load_table("demo", ["methods={}"], output_dir=str(tmp_path / "out")))
