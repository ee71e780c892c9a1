"""What was published is data of a configuration, and every figure of it is compared."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from llava_keeplora.config import list_configs, load_config, parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.reproduce import check_expected, compare, comparison
from llava_keeplora.run_folder import dump_config
from llava_keeplora.saved_run import run_identity
from llava_keeplora_eval import EvalError, Matrix
from llava_keeplora_recipes import load_recipe

SOURCE = {"source": "a paper"}
TREE = {"tasks": ["digits", "shapes"], "methods": {"seq-lora": {}}}


def expected(**rows):
    return parse_config(
        TREE | {"expected": {label.replace("_", "-"): SOURCE | row for label, row in rows.items()}}
    ).expected


def results():
    zero_shot = [10.0, 20.0]
    return {
        "zero-shot": Matrix(["digits", "shapes"], zero_shot),
        "seq-lora": Matrix(["digits", "shapes"], zero_shot, [[50.0, 30.0], [40.0, 60.0]]),
    }


def test_a_figure_is_met_within_its_tolerance_and_missed_beyond():
    figures = compare(
        results(),
        expected(seq_lora={"figures": {"transfer": 29.1, "average": 46.1, "last": 51.0}, "tolerance": 1.0}),
    )
    assert [(f.name, f.measured, f.met) for f in figures] == [
        ("transfer", 30.0, True),
        ("average", 45.0, False),
        ("last", 50.0, True),
    ]
    assert str(figures[1]) == "seq-lora, average: 45.0 instead of 46.1 ± 1.0"


def test_the_untouched_model_is_compared_as_one_that_never_changes():
    figures = compare(
        results(),
        expected(zero_shot={"figures": {"transfer": 20.0, "average": 15.0}, "last": {"digits": 10.0}}),
    )
    assert [(f.name, f.measured, f.met) for f in figures] == [
        ("transfer", 20.0, True),
        ("average", 15.0, True),
        ("digits", 10.0, True),
    ]


def test_a_number_that_the_run_does_not_have_is_not_met():
    figure = compare(
        {"seq-lora": Matrix(["digits", "shapes"], None, [[50.0]])},
        expected(seq_lora={"figures": {"last": 50.0}}),
    )[0]
    assert (
        figure.measured is None
        and not figure.met
        and str(figure) == "seq-lora, last: n/a instead of 50.0 ± 1.0"
    )


def test_the_comparison_is_a_table_with_its_sources():
    published = expected(seq_lora={"figures": {"transfer": 29.0}})
    assert comparison(compare(results(), published), published) == (
        "| row | figure | published | measured | difference | tolerance | met |\n| --- | --- | ---: | ---: | ---: | ---: | --- |\n"
        "| seq-lora | transfer | 29.0 | 30.0 | 1.0 | 1.0 | yes |\n\nseq-lora: a paper\n"
    )
    assert "nothing to compare with" in comparison([], {})


def test_the_published_tables_of_zscl_are_met_by_its_published_matrices():
    """The arithmetic of the comparison, on matrices and figures that others computed."""
    folder = Path(
        os.environ.get("LLAVA_KEEPLORA_PARITY", Path(__file__).resolve().parents[3] / "shared/parity")
    )
    if not (folder / "mtil_matrices.npz").is_file():
        pytest.skip("set LLAVA_KEEPLORA_PARITY to the folder of the parity fixtures")
    said = json.loads((folder / "mtil_published.json").read_text())
    with np.load(folder / "mtil_matrices.npz") as matrices:
        tasks = [str(i) for i in range(11)]
        for name in matrices.files:
            matrix = Matrix(tasks, None, matrices[name].tolist())
            row = parse_config(
                TREE | {"expected": {"seq-lora": SOURCE | {"figures": said[name], "tolerance": 0.0501}}}
            ).expected
            assert all(f.met for f in compare({"seq-lora": matrix}, row)), name


# --- the shipped configurations ----------------------------------------------------------------------


@pytest.mark.parametrize("name", list_configs())
def test_what_a_shipped_configuration_expects_is_of_its_own_tasks(name):
    config = load_config(name)
    tasks = {load_recipe(task).name for task in config.tasks}
    for row in config.expected.values():
        assert set(row.last) <= tasks and row.figures


@pytest.mark.parametrize("name", ["mtil-order1", "mtil-order2"])
def test_the_expected_aggregates_of_the_untouched_clip_follow_from_its_expected_scores(name):
    """The figures of two published tables agree, to the digit that rounding leaves open."""
    config = load_config(name)
    row = config.expected["zero-shot"]
    metrics = (
        Matrix(list(config.tasks), [row.last[task] for task in config.tasks]).constant_zero_shot().metrics()
    )
    assert all(metrics[key] == pytest.approx(value, abs=0.06) for key, value in row.figures.items())


def test_the_settings_of_mtil_are_the_published_ones():
    for name in ("mtil-order1", "mtil-order2"):
        config = load_config(name)
        keeplora = config.methods["keeplora"]
        assert {p: (c.rank, c.alpha, c.energy_weight, c.energy_feature) for p, c in keeplora.parts.items()} == {
            "vision": (16, 1.0, 0.85, 0.99), "text": (16, 1.0, 0.2, 0.99),
        }  # fmt: skip
        assert (
            config.seed,
            keeplora.training["learning_rate"],
            keeplora.training["weight_decay"],
            keeplora.training["per_device_train_batch_size"],
        ) == (42, 1e-3, 0.01, 64)


def test_what_was_published_is_no_part_of_a_run():
    plain, with_figures = (
        parse_config(TREE),
        parse_config(TREE | {"expected": {"seq-lora": SOURCE | {"figures": {"last": 1}}}}),
    )
    assert run_identity(plain) == run_identity(with_figures) and dump_config(plain) == dump_config(
        with_figures
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"sq-lora": SOURCE},
            "expected names the row 'sq-lora', which the run does not have; did you mean 'seq-lora'",
        ),
        (
            {"seq-lora": {}},
            "expected.seq-lora.source is missing, but expected figures must have one; name the paper and the table",
        ),
        (
            {"seq-lora": SOURCE | {"figures": {"avg": 1}}},
            "expected.seq-lora.figures names 'avg', which is not an aggregate; ",
        ),
        (
            {"seq-lora": SOURCE | {"figures": {"last": "high"}}},
            "expected.seq-lora.figures and last must hold finite numbers (got 'high' for 'last'); write percents",
        ),
        (
            {"seq-lora": SOURCE | {"tolerance": 0}},
            "expected.seq-lora.tolerance must be above 0, as published figures are rounded (got 0.0)",
        ),
        (
            {"seq-lora": SOURCE | {"figure": {}}},
            "unknown key 'expected.seq-lora.figure'; did you mean 'figures'",
        ),
        ({"seq-lora": 3}, "expected.seq-lora is 3, but it takes `key: value` pairs"),
    ],
)
def test_a_figure_that_cannot_be_is_named_with_its_place(row, words):
    with pytest.raises(ConfigError) as caught:
        parse_config(TREE | {"expected": row})
    assert words in str(caught.value)


def test_a_figure_of_a_task_that_the_run_does_not_have_is_reported():
    with pytest.raises(EvalError, match="the matrix has no task 'digit'; did you mean 'digits'"):
        compare(results(), expected(seq_lora={"last": {"digit": 1.0}}))


def test_a_task_that_the_run_does_not_have_is_found_before_it_begins():
    source = SOURCE | {"last": {"digits": 90.0, "digit": 90.0}}
    with pytest.raises(
        ConfigError,
        match="expected.seq-lora.last names 'digit', which is no task of the run; did you mean 'digits'",
    ):
        check_expected(parse_config(TREE | {"expected": {"seq-lora": source}}))
