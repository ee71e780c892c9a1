"""Runs of two and three tasks, as configurations, in one process, and in two."""

import json
import sys
from functools import partial

import pytest
import yaml

from llava_keeplora.config import ModelConfig, parse_config
from llava_keeplora.models import open_model
from small_vlms import SMALL_VLMS
from tiny_encoders import KINDS, write_encoders
from tiny_models import TASKS
from zero_runs import BATCH, STEADY, ZERO, distances, first_tasks, halved

UNDRAWN = """
import runpy
from llava_keeplora.sequence import runner
runner.write_run_report = lambda root: None
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="session")
def script(script, tmp_path_factory):
    """scripts/train_seq.py without the report, which takes a quarter of a small run's time."""
    path = tmp_path_factory.mktemp("script") / "train_seq.py"
    path.write_text(UNDRAWN.format(script=str(script)))
    return path


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Function (tree, zero) → the path of its YAML, beside the JSON that it names."""

    def write(tree, zero=None):
        folder = tmp_path_factory.mktemp("config")
        if zero:
            (folder / "zero.json").write_text(json.dumps({**BATCH, **zero}))
            tree["training"]["deepspeed"] = str(folder / "zero.json")
        (folder / "run.yaml").write_text(yaml.safe_dump(tree))
        return folder / "run.yaml"

    return write


@pytest.fixture(scope="session")
def trees(run_tree, llava_tree, small_vlm, tmp_path_factory):
    """Family, or type of model → a run of three tasks."""
    encoders = tmp_path_factory.mktemp("encoders")

    def of_encoders(kind, **changes):
        if not (encoders / kind).exists():
            write_encoders(encoders / kind, kind, [name for names in TASKS.values() for name in names])
        tree = run_tree(
            "unset",
            methods={"keeplora": {}},
            training=STEADY,
            model={"name_or_path": str(encoders / kind)},
            **changes,
        )
        return tree | {"parts": {name: part | {"targets": None} for name, part in tree["parts"].items()}}

    def of_chat(kind, **changes):
        model = {"name_or_path": str(small_vlm(kind))}
        part = {"rank": 2, "alpha": 2, "energy_weight": 0.5, "energy_feature": 0.9}
        tree = llava_tree("unset", training=STEADY, model=model, **changes)
        return tree | {"parts": {name: dict(part) for name in open_model(ModelConfig(**model)).targets}}

    return {
        **{kind: partial(of_encoders, kind) for kind in KINDS},
        **{kind: partial(of_chat, kind) for kind in SMALL_VLMS},
        "clip": lambda **changes: run_tree(
            "unset", **{"methods": {"keeplora": {}}, "training": STEADY} | changes
        ),
        "llava": lambda **changes: llava_tree(
            "unset", training=STEADY, parts={"connector": {"learning_rate": None}}, **changes
        ),
    }


@pytest.fixture(scope="session")
def references(trees, driven, tmp_path_factory):
    """Family and number of tasks → the same run in one process, without DeepSpeed."""
    done = {}

    def reference(family, count):
        if (family, count) not in done:
            folder = tmp_path_factory.mktemp(family) / "run"
            tree = first_tasks(trees[family](), count)
            done[family, count] = driven(parse_config(tree | {"output_dir": str(folder)}))
        return done[family, count]

    return reference


@pytest.fixture
def in_two(written, launch, script, tmp_path):
    """Function (tree, zero) → (exit code, errors) of the same run in two processes, in the folder `two`."""

    def run(tree, zero=None):
        path = written(halved(tree), zero)
        code, _, err = launch(
            [sys.executable, script], "--config", path, "--output-dir", tmp_path / "two", processes=2
        )
        return code, err

    return run


@pytest.fixture
def one_and_two(trees, driven, in_two, tmp_path):
    """Function (stage, **changes) → distances of a LLaVA run in two processes from the same in one."""

    def measure(stage, **changes):
        driven(parse_config(trees["llava"](**changes) | {"output_dir": str(tmp_path / "one")}))
        code, err = in_two(trees["llava"](**changes), ZERO[stage])
        assert code == 0, err
        return distances(tmp_path / "one", tmp_path / "two")

    return measure
