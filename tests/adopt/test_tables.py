"""Tables of runs whose tasks are adopted."""

import json
from pathlib import Path

import pytest

from llava_keeplora.compare import compare, parse_table
from llava_keeplora.compare.jobs import table_jobs
from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError, RunError


@pytest.fixture
def tree(run_tree, tiny_tasks, tmp_path):
    """Function (**changes) → a table of KeepLoRA on two tasks, as plain data."""
    tasks = [str(task) for task in tiny_tasks[:2]]
    return lambda **changes: run_tree(
        tmp_path / "table", **{"tasks": tasks, "methods": {"keeplora": {}}} | changes
    )


def test_each_order_has_its_own_sources(tree, tiny_tasks):
    tasks = [str(task) for task in tiny_tasks[:2]]
    orders = {
        "I": {"tasks": tasks, "adopted": ["one", None]},
        "II": {"tasks": tasks[::-1], "adopted": [None, "one"]},
    }
    table = parse_table(tree(orders=orders, tasks=None))
    found = {
        name: parse_config(job.tree).adopted for name, (job,) in table_jobs(table, table.methods).items()
    }
    assert found == {"I": ("one", None), "II": (None, "one")}
    (job,) = table_jobs(single := parse_table(tree(adopted=["one", None])), single.methods)["I"]
    assert parse_config(job.tree).adopted == ("one", None)


@pytest.mark.parametrize(
    "changes, match",
    [
        (
            {"adopted": ["one", None], "orders": {"I": ["a", "b"], "II": ["b", "a"]}},
            "adopted lists.*2 orders.*each order",
        ),
        (
            {"orders": {"I": {"tasks": ["a"], "adopted": "one"}}},
            r"orders.I.adopted is 'one', but it takes a list",
        ),
        (
            {"orders": {"I": {"tasks": ["a"], "adopted": [1]}}},
            r"orders.I.adopted is \[1\], but it takes a list",
        ),
    ],
)
def test_sources_that_are_no_orders_are_refused(tree, changes, match):
    with pytest.raises(ConfigError, match=match):
        parse_table(tree(**changes | {"tasks": None}))


def test_what_no_run_can_take_over_is_refused_before_the_first_starts(tree, tmp_path):
    with pytest.raises(
        ConfigError, match=r"'keeplora\+' cannot take over task 'colours'.*into a run of seq-lora, keeplora"
    ):
        compare(parse_table(tree(adopted=["one", None], methods={"keeplora": {}, "keeplora+": {}})))
    with pytest.raises(ConfigError, match="adopted lists 1 sources for 2 tasks"):
        compare(parse_table(tree(adopted=["one"])))
    assert not (tmp_path / "table").exists()


@pytest.mark.slow
def test_a_table_adopts_and_knows_its_sources_again(tree, tiny_tasks, peft_adapter, tmp_path):
    tasks, adapter = [str(task) for task in tiny_tasks[:2]], peft_adapter(tmp_path / "adapter")
    orders = {
        "I": {"tasks": tasks, "adopted": [str(adapter), None]},
        "II": {"tasks": tasks[::-1], "adopted": [None, str(adapter)]},
    }
    table = parse_table(tree(orders=orders, tasks=None, methods={"keeplora": {}, "seq-lora": {}}))
    outcome = compare(table)
    assert not outcome.failures and all(len(results) == 3 for results in outcome.results.values())
    for folder, path in (("I", "task-01-colours"), ("II", "task-02-colours")):
        record = json.loads(
            (tmp_path / f"table/{folder}/seed-0/keeplora/keeplora/{path}/train.json").read_text()
        )
        assert record["adopted"]["source"] == "adapter"
    before = Path(tmp_path / "table/I/seed-0/keeplora/results.json").read_bytes()
    compare(table)
    peft_adapter(adapter, seed=1)
    with pytest.raises(RunError, match="adapter has changed since .* took it over as task 'colours'"):
        compare(table)
    assert Path(tmp_path / "table/I/seed-0/keeplora/results.json").read_bytes() == before
