"""The shipped benchmark configurations run from end to end: small models, tiny data in the official layouts."""

import json
from pathlib import Path

import pytest

from first_methods import first_of
from llava_keeplora.config import load_config
from llava_keeplora_eval import Matrix
from llava_keeplora_recipes import load_sequence

#: All that differs from the shipped settings beside the batch and the epochs; mixed precision stays. Methods' own steps, epochs and warm-ups are short.
CLIP = (
    "methods.zscl.training.max_steps=1",
    "methods.moe-adapters.training.max_steps=1",
    "methods.zscl.training.warmup_steps=0",
    "methods.moe-adapters.training.warmup_steps=0",
    "methods.keeplora+.training.num_train_epochs=1",
    "methods.iap.training.per_device_train_batch_size=8",
)
#: What the rows of rank 128 need on layers of width 16, and their steps.
NUSA = [
    f"methods.{row}-nusa.{change}"
    for row in ("seq-lora", "inflora")
    for change in (
        "parts.vision.rank=2",
        "parts.text.rank=2",
        "training.max_steps=1",
        "training.warmup_steps=0",
    )
]
NUSA += ["methods.keeplora+-released.training.num_train_epochs=1"]
#: And what a random LLaVA of width 32 needs.
LLAVA = ("model.max_length=null", "parts.language.rank=2", "evaluation.max_new_tokens=4")


@pytest.mark.parametrize(
    ("name", "family"),
    [("mtil-order1", "clip"), ("mtil-order2", "clip"), ("ucit", "llava"), ("mllm-dcl", "llava")],
)
def test_a_benchmark_has_a_row_for_every_first_method_that_runs_on_its_model(name, family):
    config = load_config(name)
    assert {method.method for method in config.methods.values()} == first_of(family) <= set(config.methods)
    released = {
        label: method.options["preset"]
        for label, method in config.methods.items()
        if label.endswith("-released")
    }
    assert set(released.values()) == {f"released-{family}"} and "keeplora-released" in released


def three_classes(recipes: dict[str, Path], name: str) -> list[str]:
    """The sequence of a configuration with the recipes for three classes each in the place of the shipped ones."""
    paths = [str(recipes[task]) for task in load_sequence(name).tasks]
    return ["sequence=null", f"tasks={json.dumps(paths)}"]


#: A row of every method, and KeepLoRA's released one.
ROWS = [
    *(label for label, method in load_config("mtil-order1").methods.items() if label == method.method),
    "keeplora-released",
]


def count_compared(printed: str) -> int:
    """Count the published figures that a comparison lists."""
    return printed.count("| no |") + printed.count("| yes |")


@pytest.mark.slow
def test_every_row_of_mtil_learns_its_first_tasks_and_is_compared(
    reproduce, mtil, mtil_recipes, imagenet, narrow_clip
):
    tasks, config = load_sequence("mtil-order1").tasks[:3], load_config("mtil-order1", methods=ROWS)
    rates = {label: method.training.get("learning_rate") for label, method in config.methods.items()}
    per_task = {label: rate for label, rate in rates.items() if isinstance(rate, list | tuple)}
    figures = {
        label: {"source": row.source, "tolerance": row.tolerance, "figures": row.figures}
        for label, row in config.expected.items()
    }
    done = reproduce(
        "mtil-order1",
        "--data-root",
        mtil.root,
        *CLIP,
        f"model.name_or_path={narrow_clip}",
        f"methods.zscl.reference={imagenet}",
        "sequence=null",
        f"tasks={json.dumps([str(mtil_recipes[task]) for task in tasks])}",
        *(f"methods.{label}.training.learning_rate={list(rates[:3])}" for label, rates in per_task.items()),
        f"expected={json.dumps(figures)}",
        "--methods",
        ",".join(ROWS),
    )
    assert done.code == 2, done.err
    assert count_compared(done.out) == sum(len(row["figures"]) for row in figures.values()) > len(ROWS)
    for label in ROWS:
        matrix = Matrix.from_json(done.folder / label / "matrix.json")
        assert matrix.tasks == tasks and matrix.complete


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
    arguments = [
        "--data-root",
        mtil.root,
        *CLIP,
        f"model.name_or_path={narrow_clip}",
        f"methods.zscl.reference={imagenet}",
        *three_classes(mtil_recipes, name),
    ]
    arguments += ["--methods", ",".join(rows)] if rows else []
    arguments += NUSA if name == "mtil-order1" and not rows else []
    done = reproduce(name, *arguments)
    config = load_config(name, methods=rows)
    for label in ("zero-shot", *config.methods):
        matrix = Matrix.from_json(done.folder / label / "matrix.json")
        assert matrix.tasks == load_sequence(name).tasks and (matrix.complete or label == "zero-shot")
    # A model of a few thousand weights is no CLIP: the run ends well, and the comparison says that it misses.
    asked = sum(len(row.figures) + len(row.last) for row in config.expected.values())
    assert (
        done.code == 2 and f"of {asked} published figures by more than the tolerance (zero-shot, " in done.err
    )
    assert count_compared(done.out) == asked
    assert f"zero-shot: {config.expected['zero-shot'].source}" in done.out
    # What it did measure is met, without a step trained anew.
    keeplora = Matrix.from_json(done.folder / "keeplora/matrix.json")
    figures = {key: round(keeplora.metrics()[key], 1) for key in ("transfer", "average", "last")}
    met = reproduce(
        name,
        *arguments,
        f"expected={json.dumps({'keeplora': {'source': 'this run', 'tolerance': 0.1, 'figures': figures}})}",
    )
    assert met.code == 0 and met.out.count("| yes |") == 3 and "keeplora: this run" in met.out


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("ucit", ["keeplora-released", "inflora"]),
        pytest.param("mllm-dcl", ["keeplora", "sd-lora"], marks=pytest.mark.slow),
        pytest.param("ucit", None, marks=pytest.mark.slow),
        pytest.param("mllm-dcl", None, marks=pytest.mark.slow),
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
    chosen = ["--methods", ",".join(rows)] if rows else []
    done = reproduce(name, "--data-root", conversations, f"model.name_or_path={tiny_llava}", *LLAVA, *chosen)
    assert done.code == 0, done.err
    assert "no figures are published for these methods" in done.out
    for label in ("zero-shot", *load_config(name, methods=rows).methods):
        matrix = Matrix.from_json(done.folder / label / "matrix.json")
        assert matrix.tasks == load_sequence(name).tasks and (matrix.complete or label == "zero-shot")


@pytest.mark.slow
def test_mtil_as_it_ships_runs_on_all_1201_classes(reproduce, whole_mtil, long_clip):
    done = reproduce(
        "mtil-order1",
        "--data-root",
        whole_mtil.root,
        *CLIP,
        f"model.name_or_path={long_clip}",
        "--methods",
        "keeplora",
        "expected={}",
    )
    assert done.code == 0, done.err
    assert Matrix.from_json(done.folder / "keeplora/matrix.json").complete
