"""docs/benchmarks.md: its commands and YAML are understood, and its tables say what the recipes and configurations say."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from llava_keeplora import cli
from llava_keeplora.config import load_config, parse_config
from llava_keeplora_recipes import load_recipe, load_sequence

TEXT = (Path(__file__).parents[2] / "docs/benchmarks.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.M | re.S)
    for line in block.splitlines()
]
MTIL = load_sequence("mtil-order1").tasks


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("llava-keeplora ")])
def test_a_command_is_understood_and_names_a_shipped_configuration(command):
    args = cli.parse_arguments(cli.build_parser(), shlex.split(command)[1:])
    config = load_config(args.config, data_root=args.data_root, methods=args.methods)
    assert config.data.root == args.data_root and (
        args.methods is None or list(config.methods) == args.methods
    )


def test_data_check_says_of_every_set_what_is_missing(tmp_path, monkeypatch, capfd):
    from llava_keeplora_eval import cli as eval_cli

    (tmp_path / "MTIL").mkdir()
    monkeypatch.chdir(tmp_path)
    command = next(c for c in COMMANDS if c.startswith("llava-keeplora-eval "))
    assert eval_cli.main(shlex.split(command)[1:]) == 2
    out, err = capfd.readouterr()
    assert all(
        f"the data of '{task}' is not there: no folder 'MTIL/{load_recipe(task).source['path']}'" in out
        for task in MTIL
    )
    assert "mtil-order1 has 22 problems, listed above" in err


def test_the_table_of_sets_is_that_of_the_recipes():
    rows = re.findall(r"^\| (mtil/\w+) \| \[[^\]]+\]\((\S+)\) \| (\d+) / (\d+) \| (\w+)", TEXT, flags=re.M)
    assert [row[0] for row in rows] == MTIL
    for task, address, train, test, split in rows:
        recipe = load_recipe(task)
        assert recipe.homepage == address and recipe.expected_sizes == {
            "train": int(train),
            "test": int(test),
        }
        assert (recipe.source["format"] == "random_split") == (split == "random")


def test_the_tree_has_every_path_that_a_recipe_reads():
    tree, reference = (
        TEXT.split("MTIL/\n")[1].split("```")[0],
        load_config("mtil-order1").methods["zscl"].options,
    )
    assert all(
        f"  {load_recipe(task).source['path'].split('/')[0]}/" in tree
        for task in [*MTIL, reference["reference"]]
    )
    assert f"  {reference['reference_texts']}\n" in tree


def test_the_tables_have_every_figure_and_say_what_compares():
    for name, compared in (
        ("mtil-order1", 12),
        ("mtil-order2", 2),
        ("ucit", 3),
        ("mllm-dcl", 0),
        ("coin", 0),
    ):
        block = TEXT.split(f"<!-- generated: figures-{name} -->")[1].split("<!-- end -->")[0]
        rows = {line.split("`")[1]: line for line in block.splitlines() if line.startswith("| `")}
        expected = load_config(name).expected
        assert list(rows) == list(expected)
        assert block.count("| compares |") + block.count("| compares; not comparable: ") == compared
        for label, row in expected.items():
            assert all(f"{key} {value}" in rows[label] for key, value in row.figures.items())
            assert row.source in rows[label] and (row.not_comparable or "") in rows[label]
            assert all(reason in rows[label] for reason in row.not_comparable_figures.values())


@pytest.mark.parametrize(("name", "transfer"), [("mtil-order1", 69.4), ("mtil-order2", 65.4)])
def test_the_untouched_models_transfer_follows_from_its_scores_and_the_order(name, transfer):
    config = load_config(name)
    scores = [config.expected["zero-shot"].last[task] for task in config.tasks]
    # Every task but the first is transferred to; a constant row has the same score after each task.
    assert sum(scores[1:]) / 10 == pytest.approx(transfer, abs=0.06) and sum(scores) / 11 == pytest.approx(
        65.3, abs=0.06
    )
    assert config.expected["zero-shot"].figures["transfer"] == transfer


def test_the_numbers_of_templates_are_those_of_the_recipes():
    told = re.search(r"of a set: (.*?), one for the others", TEXT, flags=re.S).group(1)
    counts = [int(n) for n in re.findall(r"(\d+) for", told)]
    assert counts == [len(recipe.test_prompts) for recipe in map(load_recipe, MTIL) if recipe.test_prompts]


def test_a_rate_of_each_set_is_the_same_in_both_orders():
    first, second = (load_config(name) for name in ("mtil-order1", "mtil-order2"))
    for label in ("zscl", "moe-adapters"):
        rates = [
            dict(zip(config.tasks, (t["learning_rate"] for t in config.trainings(label)), strict=True))
            for config in (first, second)
        ]
        assert rates[0] == rates[1] and len(set(rates[0].values())) > 1


def test_the_yaml_is_valid(tmp_path):
    other = TEXT.split("\n## General ability\n")[
        0
    ]  # tests/recipes/test_general_layouts.py reads that section
    recipe, space, row = re.findall(r"^```yaml\n(.*?)^```", other, flags=re.M | re.S)
    (tmp_path / "cifar100.yaml").write_text(recipe)
    (tmp_path / "space.yaml").write_text(space)
    assert load_recipe(tmp_path / "space.yaml").source["frames"] == 8
    assert load_recipe(tmp_path / "cifar100.yaml").source["columns"] == {
        "image": "img",
        "label": "fine_label",
    }
    assert parse_config(yaml.safe_load(row) | {"sequence": "mtil-order1"}).expected[
        "keeplora-released"
    ].figures == {"transfer": 69.0}
