"""The shipped benchmark configurations run from end to end: small models, tiny data in the official layouts."""

import json
from pathlib import Path

import pytest
import yaml

from llava_keeplora.config import RunConfig, load_config, read_config, with_settings
from llava_keeplora.methods import METHODS
from llava_keeplora.methods.merge import RULES
from llava_keeplora.methods.task_router import MODEL, PROTOTYPES, ROUTINGS
from llava_keeplora.plan import describe, make_plan
from llava_keeplora.reproduce import VERDICTS
from llava_keeplora_eval import Matrix
from llava_keeplora_recipes import load_recipes, load_sequence

#: Rows with more parameters than a random CLIP of width 32 has room for.
WIDE = ("seq-lora-nusa", "inflora-nusa", "nusa-cl", "merge-condu")


def shorter(name: str) -> list[str]:
    """All that differs from a configuration of MTIL but the batch and the epochs; mixed precision stays."""
    settings = ["methods.iap.training.per_device_train_batch_size=8"]
    for label, method in load_config(name).methods.items():
        if "max_steps" in method.training:
            settings += [f"methods.{label}.training.max_steps=1", f"methods.{label}.training.warmup_steps=0"]
        if label.startswith("keeplora+"):
            settings.append(f"methods.{label}.training.num_train_epochs=1")
        if label in WIDE:
            settings += [f"methods.{label}.parts.{part}.rank=2" for part in ("vision", "text")]
    return settings


def narrower(name: str) -> list[str]:
    """What a random LLaVA of width 32 needs of a configuration."""
    wide = [
        label for label, method in load_config(name).methods.items() if method.parts["language"].rank > 16
    ]
    return [
        *("model.max_length=null", "parts.language.rank=2", "evaluation.max_new_tokens=4"),
        *(f"methods.{label}.parts.language.rank=2" for label in wide),
    ]


def options_of(config: RunConfig, method: str, option: str) -> set[str]:
    """Return the values of an option over a configuration's rows of a method, its default where a row has none."""
    default = getattr(METHODS[method].Options(), option)
    return {row.options.get(option, default) for row in config.methods.values() if row.method == method}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *(("mtil-order1", "clip"), ("mtil-order2", "clip")),
        *((name, "llava") for name in ("ucit", "mllm-dcl", "coin", "mllm-acl")),
    ],
)
def test_a_benchmark_has_a_row_for_every_method_that_runs_on_its_model(name, family):
    config = load_config(name)
    methods = {method for method, cls in METHODS.items() if family in cls.info.families} - {"zero-shot"}
    assert {method.method for method in config.methods.values()} == methods <= set(config.methods)
    released = {
        label: method.options["preset"]
        for label, method in config.methods.items()
        if label.endswith("-released")
    }
    assert set(released.values()) == {f"released-{family}"} and "keeplora-released" in released
    # So has every rule of merging, and every router that the model can follow: a CLIP cannot be asked for a task.
    routings = set(ROUTINGS) - {MODEL} if family == "clip" else set(ROUTINGS)
    assert options_of(config, "merge", "rule") == set(RULES)
    assert options_of(config, "task-lora", "routing") == routings
    assert config.methods["merge-condu"].options["routing"] == PROTOTYPES


def three_classes(recipes: dict[str, Path], name: str) -> list[str]:
    """The sequence of a configuration with the recipes for three classes each in the place of the shipped ones."""
    paths = [str(recipes[task]) for task in load_sequence(name).tasks]
    return ["sequence=null", f"tasks={json.dumps(paths)}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mtil-order1", "mtil-order2", "ucit", "mllm-dcl", "coin", "mllm-acl"])
def test_a_benchmark_is_planned_without_its_data(name, long_clip, tiny_llava):
    clip = name.startswith("mtil")
    settings = shorter(name) if clip else narrower(name)
    base = f"model.name_or_path={long_clip if clip else tiny_llava}"
    # The released statistics of CLIP average batches in their order, in one process.
    plan = make_plan(load_config(name, [base, *settings]), 1 if clip else 8, 80.0)
    rows = load_config(name).methods
    unplanned = {"zscl", "moe-adapters", "iap", "inflora"}
    assert set(plan.left_out) == {label for label, row in rows.items() if row.method in unplanned}
    assert {method.label for method in plan.methods} == set(rows) - set(plan.left_out)
    published = {r.name for r in load_recipes(plan.tasks) if {"train", "test"} <= set(r.expected_sizes)}
    assert set(plan.assumed) == set(plan.tasks) - published and plan.tasks == tuple(load_sequence(name).tasks)
    assert describe(plan).count(" more") <= 3


#: A row of every method, and KeepLoRA's released one.
ROWS = [
    *(label for label, method in load_config("mtil-order1").methods.items() if label == method.method),
    "keeplora-released",
]


def has_its_scores(matrix: Matrix, label: str) -> bool:
    """Whether a row has all of its scores: bounds have one per task, the untouched model none after a task."""
    return matrix.complete or label == "zero-shot" or None not in matrix.rows[-1]


def count(printed: str, verdict: str) -> int:
    """Count the published figures on which a comparison has a verdict."""
    return printed.count(f"| {verdict} |")


def count_figures(name: str, rows: list[str] | None) -> int:
    """Count the published figures of some rows of a configuration."""
    return sum(len(list(row.published())) for row in load_config(name, methods=rows).expected.values())


@pytest.mark.slow
def test_every_row_of_mtil_learns_its_first_tasks_and_is_compared(
    reproduce, mtil, mtil_recipes, imagenet, narrow_clip
):
    tasks, config = load_sequence("mtil-order1").tasks[:3], load_config("mtil-order1", methods=ROWS)
    rates = {label: method.training.get("learning_rate") for label, method in config.methods.items()}
    per_task = {label: rate for label, rate in rates.items() if isinstance(rate, list | tuple)}
    done = reproduce(
        "mtil-order1",
        "--data-root",
        mtil.root,
        *shorter("mtil-order1"),
        f"model.name_or_path={narrow_clip}",
        f"methods.zscl.reference={imagenet}",
        "sequence=null",
        f"tasks={json.dumps([str(mtil_recipes[task]) for task in tasks])}",
        *(f"methods.{label}.training.learning_rate={list(rates[:3])}" for label, rates in per_task.items()),
        "--methods",
        ",".join(ROWS),
    )
    assert done.code == 0, done.err
    assert count(done.out, "not comparable") == count_figures("mtil-order1", ROWS) > len(ROWS)
    assert "missing tasks (mtil/dtd, mtil/eurosat, mtil/flowers, mtil/food, 4 more)" in done.out
    for label in ROWS:
        matrix = Matrix.from_json(done.folder / label / "matrix.json")
        assert matrix.tasks == tasks and has_its_scores(matrix, label)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("mtil-order1", ["keeplora"]),
        pytest.param("mtil-order2", ["keeplora"], marks=pytest.mark.slow),
        pytest.param("mtil-order1", None, marks=pytest.mark.slow),
        pytest.param("mtil-order2", None, marks=pytest.mark.slow),
    ],
)
def test_mtil_runs_in_its_order_and_is_compared(
    reproduce, mtil, mtil_recipes, imagenet, narrow_clip, name, rows
):
    settings = [
        *shorter(name),
        f"model.name_or_path={narrow_clip}",
        f"methods.zscl.reference={imagenet}",
        *three_classes(mtil_recipes, name),
    ]
    chosen = ["--methods", ",".join(rows)] if rows else []
    done = reproduce(name, "--data-root", mtil.root, *settings, *chosen)
    config = load_config(name, methods=rows)
    for label in ("zero-shot", *config.methods):
        matrix = Matrix.from_json(done.folder / label / "matrix.json")
        assert matrix.tasks == load_sequence(name).tasks and has_its_scores(matrix, label)
    # A model of a few thousand weights is no CLIP: the run ends well, and nothing compares.
    asked = count_figures(name, rows)
    assert done.code == 0 and count(done.out, "not comparable") == asked
    assert f"zero-shot: {config.expected['zero-shot'].source}; tolerance: " in done.out
    assert f"other base model ({narrow_clip} instead of openai/clip-vit-base-patch16)" in done.out
    written = json.loads((done.folder / "reproduction.json").read_text())
    assert written["verdicts"] == {"reproduced": 0, "not reproduced": 0, "not comparable": asked}
    # In a configuration of its own, what it did measure is reproduced, without a step trained anew.
    keeplora = Matrix.from_json(done.folder / "keeplora/matrix.json")
    figures = {key: round(keeplora.metrics()[key], 1) for key in ("transfer", "average", "last")}
    figures["last"] += 1
    own = done.folder.parent / "own.yaml"
    row = {"source": "this run", "tolerance": 0.1, "figures": figures}
    tree = with_settings(read_config(name), reproduce.small + settings, methods=rows)
    own.write_text(yaml.safe_dump(tree | {"expected": {"keeplora": row}}))
    compared = reproduce(own, "--output-dir", done.folder, "--data-root", mtil.root)
    assert compared.code == 2 and "misses 1 of 3 published figures by more than the tolerance" in compared.err
    assert [count(compared.out, verdict) for verdict in VERDICTS] == [2, 1, 0]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param("ucit", ["keeplora-released", "inflora"], marks=pytest.mark.slow),
        pytest.param("mllm-dcl", ["keeplora", "sd-lora"], marks=pytest.mark.slow),
        *(
            pytest.param(name, None, marks=pytest.mark.slow)
            for name in ("ucit", "mllm-dcl", "coin", "mllm-acl")
        ),
    ],
)
def test_a_benchmark_of_llava_runs_in_its_order(
    reproduce, conversations, tiny_llava, monkeypatch, name, rows
):
    from llava_keeplora_eval import java

    # METEOR's Java program takes ten seconds to start, for every score.
    monkeypatch.setattr(
        java, "find_jar", lambda pattern: Path("meteor.jar") if pattern == java.METEOR else None
    )
    monkeypatch.setattr(java, "meteor", lambda jar, captions, references: 0.25)
    # The question for a task names all tasks, and is longer than what the random model takes.
    rows = rows or [label for label in load_config(name).methods if label != "task-lora-model"]
    chosen = ["--methods", ",".join(rows)]
    done = reproduce(
        name, "--data-root", conversations, f"model.name_or_path={tiny_llava}", *narrower(name), *chosen
    )
    assert done.code == 0, done.err
    asked = count_figures(name, rows)
    assert count(done.out, "not comparable") == asked
    assert asked or "no figures are published for these methods" in done.out
    for label in ("zero-shot", *load_config(name, methods=rows).methods):
        matrix = Matrix.from_json(done.folder / label / "matrix.json")
        assert matrix.tasks == load_sequence(name).tasks and has_its_scores(matrix, label)


@pytest.mark.slow
def test_mtil_as_it_ships_runs_on_all_1201_classes(reproduce, whole_mtil, long_clip):
    done = reproduce(
        "mtil-order1",
        "--data-root",
        whole_mtil.root,
        *shorter("mtil-order1"),
        f"model.name_or_path={long_clip}",
        "--methods",
        "keeplora",
        "expected={}",
    )
    assert done.code == 0, done.err
    assert Matrix.from_json(done.folder / "keeplora/matrix.json").complete
