"""What was published is data of a configuration, and every figure of it is compared."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llava_keeplora.cli.tables import _as_written
from llava_keeplora.config import list_configs, load_config, parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.reproduce import (
    NOT_COMPARABLE,
    NOT_REPRODUCED,
    REPRODUCED,
    Measured,
    check_expected,
    compare,
    comparison,
    count_verdicts,
    differences,
    read_measured,
    write_comparison,
)
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


def test_a_figure_is_reproduced_within_its_tolerance_and_not_beyond():
    figures = compare(
        results(),
        expected(seq_lora={"figures": {"transfer": 29.1, "average": 46.1, "last": 51.0}, "tolerance": 1.0}),
    )
    assert [(f.name, f.measured, f.verdict) for f in figures] == [
        ("transfer", 30.0, REPRODUCED),
        ("average", 45.0, NOT_REPRODUCED),
        ("last", 50.0, REPRODUCED),
    ]
    assert str(figures[1]) == "seq-lora, average: 45.0 instead of 46.1 ± 1.0"


def test_the_untouched_model_is_compared_as_one_that_never_changes():
    figures = compare(
        results(),
        expected(zero_shot={"figures": {"transfer": 20.0, "average": 15.0}, "last": {"digits": 10.0}}),
    )
    assert [(f.name, f.measured, f.verdict) for f in figures] == [
        ("transfer", 20.0, REPRODUCED),
        ("average", 15.0, REPRODUCED),
        ("digits", 10.0, REPRODUCED),
    ]


def test_a_number_that_the_run_does_not_have_is_not_comparable():
    figure = compare(
        {"seq-lora": Matrix(["digits", "shapes"], None, [[50.0]])},
        expected(seq_lora={"figures": {"last": 50.0}}),
    )[0]
    assert (
        figure.measured is None
        and figure.verdict == NOT_COMPARABLE
        and figure.reasons == ("the run has no such figure",)
        and str(figure) == "seq-lora, last: n/a instead of 50.0 ± 1.0"
    )


def test_a_figure_that_nobody_could_reproduce_is_not_comparable_and_the_others_of_its_row_are():
    row = {
        "figures": {"transfer": 30.0, "last": 50.0},
        "not_comparable_figures": {"last": "it failed before"},
    }
    published = expected(seq_lora=row)
    transfer, last = compare(results(), published)
    assert transfer.verdict == REPRODUCED and not transfer.reasons
    assert last.verdict == NOT_COMPARABLE and last.reasons == ("it failed before",) and last.measured == 50.0
    assert "not comparable: it failed before" in comparison([transfer, last], published)
    both = compare(results(), published, {"seq-lora": ["other data"]})
    assert [figure.reasons for figure in both] == [("other data",), ("other data", "it failed before")]


def test_the_comparison_is_a_table_with_its_sources():
    published = expected(seq_lora={"figures": {"transfer": 29.0}})
    assert comparison(compare(results(), published), published) == (
        "| row | figure | published | measured | difference | tolerance | verdict |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | --- |\n"
        "| seq-lora | transfer | 29.0 | 30.0 | 1.0 | 1.0 | reproduced |\n\nseq-lora: a paper\n\n"
        "1 reproduced, 0 not reproduced, 0 not comparable\n"
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
            assert all(f.verdict == REPRODUCED for f in compare({"seq-lora": matrix}, row)), name


# --- what does not compare ---------------------------------------------------------------------------

PUBLISHED = SOURCE | {"model": "tiny-clip", "sequence": "demo", "figures": {"last": 50.0}}
DEMO = {"sequence": "demo", "model": {"name_or_path": "tiny-clip"}, "methods": {"seq-lora": {}}}


def clauses(tree=(), measured=None, **published):
    """Why a run of other settings than `DEMO` does not compare with figures of it."""
    written = parse_config(DEMO | {"expected": {"seq-lora": PUBLISHED | published}})
    config = parse_config(DEMO | {"expected": {"seq-lora": PUBLISHED | published}} | dict(tree))
    return differences(config, measured or Measured(), written)["seq-lora"]


def test_a_run_as_it_was_published_compares():
    assert clauses() == clauses(seeds=1) == clauses(test_prompts="one") == []


@pytest.mark.parametrize(
    ("tree", "clause"),
    [
        ({"model": {"name_or_path": "other"}}, "other base model (other instead of tiny-clip)"),
        (
            {"model": DEMO["model"] | {"dtype": "bfloat16", "revision": "v2", "max_length": 9}},
            "other base model (another model.revision, model.dtype, model.max_length)",
        ),
        ({"data": {"on_bad_image": "drop"}}, "other data (another data.on_bad_image)"),
        ({"data": {"holdout": 0.1}}, "other data (scored on 0.1 of the training data)"),
        (
            {"data": {"train_examples": 9}},
            "other data (about 9 training examples of each task)",
        ),
        (
            {"evaluation": {"test_prompts": "averaged"}},
            "other protocol (test_prompts averaged instead of one)",
        ),
        ({"evaluation": {"max_new_tokens": 3}}, "other protocol (another evaluation.max_new_tokens)"),
        ({"training": {"max_steps": 3}}, "other settings (training.max_steps)"),
        (
            {"training": {"per_device_train_batch_size": 4}},
            "other settings (4 examples per step instead of 8)",
        ),
        ({"adopted": ["elsewhere", *[None] * 6]}, "other settings (adopted)"),
        ({"guard": {"old_tasks": {"max_drop": 2.0}, "on_failure": "shrink"}}, "other settings (guard)"),
    ],
)
def test_a_run_with_another_setting_does_not_compare_and_says_which(tree, clause):
    assert clauses(tree, test_prompts="one")[-1] == clause


@pytest.mark.parametrize(
    ("tasks", "clause"),
    [
        (["shapes", "digits", "textures", "glyphs"], "missing tasks (counting, typefaces, relations)"),
        (
            ["digits", "shapes", "textures", "glyphs", "counting", "typefaces", "relations"],
            "another order of tasks",
        ),
        (
            ["shapes", "digits", "textures", "glyphs", "counting", "typefaces", "relations", "fashion"],
            "other tasks (fashion)",
        ),
    ],
)
def test_a_run_of_other_tasks_does_not_compare(tasks, clause):
    assert clause in clauses({"sequence": None, "tasks": tasks})


def test_a_benchmark_that_is_not_scored_in_full_has_missing_tasks():
    row = SOURCE | {"sequence": "mllm-acl", "figures": {"last": 50.0}}
    config = parse_config(DEMO | {"sequence": "mllm-acl", "expected": {"seq-lora": row}})
    assert differences(config, Measured()) == {"seq-lora": ["missing tasks (Math, APP)"]}


def test_other_data_under_a_shipped_name_do_not_compare(tmp_path):
    path = tmp_path / "sat.yaml"
    path.write_text(
        '{"extends": "mtil/eurosat", "prompt": "a {c}", "source": {"format": "imagefolder", "path": "x"}}'
    )
    tree = {"sequence": None, "tasks": [str(path), "mtil/mnist"], "methods": {"seq-lora": {}}}
    row = SOURCE | {"sequence": "mtil-order1", "figures": {"last": 50.0}}
    config = parse_config(tree | {"expected": {"seq-lora": row}})
    found = differences(config, Measured({"mtil/mnist": 30}))["seq-lora"]
    assert found[1:] == ["other data (mtil/eurosat has another prompt, and 1 more of the tasks)"]
    config = parse_config(tree | {"tasks": ["mtil/mnist"], "expected": {"seq-lora": row}})
    found = differences(config, Measured({"mtil/mnist": 30}))["seq-lora"]
    assert found[1:] == ["other data (mtil/mnist has 30 test examples instead of 10000)"]
    own = parse_config(tree | {"expected": {"seq-lora": SOURCE | {"figures": {"last": 50.0}}}})
    assert differences(own, Measured({"mtil/mnist": 30})) == {"seq-lora": []}


def test_without_a_sequence_the_figures_are_of_the_tasks_that_the_configuration_has(tmp_path):
    path = tmp_path / "shapes.yaml"
    path.write_text('{"extends": "shapes", "prompt": "a {c}"}')
    row = SOURCE | {"figures": {"last": 50.0}}
    tree = {"tasks": ["digits", "shapes"], "methods": {"seq-lora": {}}, "expected": {"seq-lora": row}}

    def reasons(written, tasks):
        configs = (parse_config(tree | {"tasks": names}) for names in (tasks, written))
        config, as_written = configs
        return differences(config, Measured(), as_written)["seq-lora"]

    own = ["digits", str(path)]
    assert reasons(own, own) == reasons(tree["tasks"], tree["tasks"]) == []
    assert (
        reasons(tree["tasks"], own)
        == reasons(own, tree["tasks"])
        == ["other data (shapes has another prompt)"]
    )
    assert reasons(own, own[::-1]) == ["another order of tasks"]
    assert reasons(own, own[:1]) == ["missing tasks (shapes)"]
    assert reasons(own[:1], own) == ["other tasks (shapes)"]


def test_a_configuration_whose_recipes_are_not_there_is_not_whole(tmp_path):
    path = tmp_path / "own.yaml"
    for task, whole in (("digits", True), (str(tmp_path / "nothing.yaml"), False)):
        path.write_text(json.dumps({"tasks": [task], "methods": {"seq-lora": {}}}))
        args = SimpleNamespace(config=str(path), methods=None, overrides=[])
        assert (_as_written(args) is not None) == whole


def test_of_a_configuration_that_is_not_whole_alone_what_makes_it_whole_alone_is_taken_from_the_command_line(
    tmp_path,
):
    path, row = tmp_path / "own.yaml", SOURCE | {"figures": {"last": 50.0}}
    training = {"learning_rate": 0.01}
    path.write_text(
        json.dumps({"methods": {"seq-lora": {}}, "expected": {"seq-lora": row}, "training": training})
    )
    given = ["tasks=[digits, shapes]", "training.learning_rate=0.5"]
    written = _as_written(SimpleNamespace(config=str(path), methods=None, overrides=given))
    assert list(written.tasks) == ["digits", "shapes"] and written.training["learning_rate"] == 0.01
    (reason,) = differences(load_config(str(path), given), Measured(), written)["seq-lora"]
    assert "learning_rate" in reason


@pytest.mark.parametrize(
    ("published", "measured", "tolerance", "shown", "verdict"),
    [
        (91.67, 91.62, 0.05, ["91.67", "91.62", "-0.05", "0.05"], REPRODUCED),
        (0.6, 1.1, 0.5, ["0.6", "1.1", "0.5", "0.5"], REPRODUCED),
        (61.7, 61.72, 1.0, ["61.7", "61.7", "0.0", "1.0"], REPRODUCED),
        (91.67, 91.61, 0.05, ["91.67", "91.61", "-0.06", "0.05"], NOT_REPRODUCED),
    ],
)
def test_figures_are_shown_with_the_digits_that_the_verdict_is_about(
    published, measured, tolerance, shown, verdict
):
    matrix = Matrix(["digits"], [1.0], [[measured]])
    row = {"figures": {"last": published}, "tolerance": tolerance}
    rows = expected(seq_lora=row)
    (figure,) = compare({"seq-lora": matrix}, rows)
    assert (figure.cells, figure.verdict) == (shown, verdict)
    assert f"| {' | '.join([*shown, verdict])} |" in comparison([figure], rows)
    assert str(figure) == f"seq-lora, last: {shown[1]} instead of {shown[0]} ± {shown[3]}"


def test_the_test_batches_of_a_row_whose_routes_depend_on_them_are_compared():
    row = SOURCE | {"figures": {"last": 50.0}}
    tree = {"methods": {"moe-adapters": {"routing": "batch"}, "iap": {}}, "sequence": "demo"}
    tree |= {"model": DEMO["model"], "expected": {"moe-adapters": row, "iap": row}}
    written = parse_config(tree)
    smaller = parse_config(tree | {"evaluation": {"batch_size": 64}})
    clause = (
        "other protocol (tested in {}, but in batches of 128 in 1 process there, and routes depend on it)"
    )
    assert differences(written, Measured(), written) == {"moe-adapters": [], "iap": []}
    assert differences(smaller, Measured(), written) == {
        "moe-adapters": [clause.format("batches of 64 in 1 process")],
        "iap": [],
    }
    several = differences(written, Measured(processes=2), written)["moe-adapters"]
    assert several[0] == clause.format("batches of 128 in 2 processes")


def test_figures_of_several_seeds_or_of_another_experiment_do_not_compare():
    assert clauses(seeds=3) == ["other number of seeds (1 instead of 3)"]
    assert clauses({"training": {"max_steps": 3}}, not_comparable="trained in full there") == [
        "trained in full there"
    ]


def test_several_processes_may_share_a_step_and_precision_is_free():
    tree = {"training": {"per_device_train_batch_size": 2, "bf16": True, "use_cpu": True}}
    assert clauses(tree, Measured(processes=4)) == []
    # So are the memory of sketches and of images, who watches, and how attention is computed.
    free = {"memory": {"statistics_gb": 1.0}, "data": {"root": "x", "cache_gb": 1.0}, "seed": 3}
    free |= {"model": DEMO["model"] | {"attn_implementation": "eager"}, "evaluation": {"batch_size": 4}}
    free |= {"guard": {"old_tasks": {"max_drop": 2.0}, "on_failure": "warn"}}
    assert clauses(free) == []
    assert clauses(tree, Measured(processes=8)) == ["other settings (16 examples per step instead of 8)"]


def test_every_verdict_is_counted_told_and_written(tmp_path):
    tree = TREE | {
        "expected": {
            "seq-lora": SOURCE
            | {"figures": {"transfer": 30.1, "last": 40.0}, "tolerance_from": "three seeds"}
            | {"last": {"digits": 44.0}, "tolerances": {"digits": 5}},
            "full": SOURCE | {"figures": {"last": 90.0}, "not_comparable": "trained in full there"},
        }
    }
    config = parse_config(tree)
    figures = compare(results(), config.expected, differences(config, Measured()))
    assert count_verdicts(figures) == {REPRODUCED: 2, NOT_REPRODUCED: 1, NOT_COMPARABLE: 1}
    text = comparison(figures, config.expected)
    assert "| seq-lora | digits | 44.0 | 40.0 | -4.0 | 5.0 | reproduced |" in text
    assert "| seq-lora | last | 40.0 | 50.0 | 10.0 | 1.0 | not reproduced |" in text
    assert "| full | last | 90.0 | n/a | n/a | 1.0 | not comparable |" in text
    assert "seq-lora: a paper; tolerance: three seeds\n" in text
    assert "full: a paper; not comparable: trained in full there\n" in text
    assert text.endswith("2 reproduced, 1 not reproduced, 1 not comparable\n")
    write_comparison(tmp_path / "reproduction.json", "own.yaml", figures, config.expected)
    written = json.loads((tmp_path / "reproduction.json").read_text())
    assert written["verdicts"] == count_verdicts(figures) and len(written["figures"]) == 4
    assert written["figures"][-1] == {
        **{"row": "full", "figure": "last", "published": 90.0, "measured": None, "difference": None},
        **{"tolerance": 1.0, "tolerance_from": "", "source": "a paper", "verdict": NOT_COMPARABLE},
        "reasons": ["trained in full there"],
    }


def test_what_a_run_was_measured_on_is_read_from_its_folder(tmp_path):
    folder = tmp_path / "zero-shot/task-00-base"
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text('{"digits": {"score": 1.0, "n": 9}, "shapes": {"score": 2.0}}')
    (tmp_path / "versions.json").write_text('{"processes": "4"}')
    assert read_measured(tmp_path) == Measured({"digits": 9}, 4)
    assert read_measured(tmp_path / "old") == Measured()


# --- the shipped configurations ----------------------------------------------------------------------


@pytest.mark.parametrize("name", list_configs())
def test_what_a_shipped_configuration_expects_is_of_its_own_tasks_and_says_its_tolerance(name):
    config = load_config(name)
    check_expected(config)
    tasks = {load_recipe(task).name for task in config.tasks}
    for row in config.expected.values():
        assert set(row.last) <= tasks and row.figures
        # What may be compared says with which model, tasks and prompts, and where its tolerance is from.
        comparable = not row.not_comparable
        assert comparable == bool(row.tolerance_from) == bool(row.model) == bool(row.sequence)
        # No origin is no reason, and a tolerance as wide as a failed reproduction of 25 points would pass it.
        assert "none published" not in row.tolerance_from
        assert max(row.tolerance, *row.tolerances.values(), 0) <= 14
        assert bool(row.test_prompts) == (comparable and name.startswith("mtil"))
    # Run as it is, a configuration compares with the figures that its settings are for.
    reasons = differences(config, Measured())
    compared = {"mtil-order1": 12, "mtil-order2": 2, "ucit": 3}
    assert sum(not why for why in reasons.values()) == compared.get(name, 0)
    if name == "coin":
        assert "lmsys/vicuna-7b-v1.5" in reasons["seq-lora"][0]


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
            "expected.seq-lora.figures, last and tolerances must hold finite numbers (got 'high' for 'last'); write percents",
        ),
        (
            {"seq-lora": SOURCE | {"tolerance": 0}},
            "expected.seq-lora.tolerance must be above 0, as published figures are rounded (got 0.0)",
        ),
        (
            {"seq-lora": SOURCE | {"figure": {}}},
            "unknown key 'expected.seq-lora.figure'; did you mean 'figures'",
        ),
        (
            {"seq-lora": SOURCE | {"figures": {"last": 9}, "tolerances": {"average": 1}}},
            "expected.seq-lora.tolerances names 'average', of which there is no figure; ",
        ),
        (
            {"seq-lora": SOURCE | {"not_comparable_figures": {"last": "it failed"}}},
            "expected.seq-lora.not_comparable_figures names 'last', of which there is no figure; ",
        ),
        (
            {"seq-lora": SOURCE | {"figures": {"last": 9}, "not_comparable_figures": {"last": True}}},
            "expected.seq-lora.not_comparable_figures must say why (got True for 'last'); ",
        ),
        (
            {"seq-lora": SOURCE | {"seeds": 0}},
            "expected.seq-lora.seeds must be at least 1 (got 0)",
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
