"""A command imports what it needs: which heavy libraries each start brings in, seen in one interpreter of its own."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from llava_keeplora_eval import Matrix
from llava_keeplora_recipes import load_recipe, load_split

#: What takes tenths of seconds and more to import.
HEAVY = [
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "transformers",
    "transformers.modeling_utils",
    "peft",
    "bitsandbytes",
    "datasets",
    "pandas",
    "evaluate",
    "scipy",
    "sklearn",
    "matplotlib",
    "deepspeed",
]
#: Runs commands one after another; after each, the heavy modules that are there, those of the commands before it included.
PROGRAM = """
import json, sys
from importlib import import_module

heavy, commands = map(json.loads, sys.argv[1:])
for program, *words in commands:
    module, _, function = program.partition(":")
    try:
        code = import_module(module) and 0 if not function else getattr(import_module(module), function)(*words and [words])
    except SystemExit as stop:
        code = stop.code
    print(json.dumps([code, [name for name in heavy if name in sys.modules]]), file=sys.stderr)
"""
#: A small run of the release before, with its base model and tasks.
ARCHIVE = Path(__file__).parents[1] / "golden/release-0.1.0.tar.gz"
TRAIN, EVAL = "llava_keeplora.cli:main", "llava_keeplora_eval.cli:main"


def heavy_after(commands, folder):
    """The heavy modules that are there after each of some commands, run one after another in a new interpreter."""
    words = [json.dumps(HEAVY), json.dumps(list(commands))]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]
    assert not any(code for code, _ in rows) and len(rows) == len(commands), done.stderr
    return [set(modules) for _, modules in rows]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Command → the heavy modules that are there after it and those before it."""
    folder = tmp_path_factory.mktemp("starts")
    Matrix(["a"], [1.0], [[2.0]]).to_json(folder / "matrix.json")
    data = load_split(load_recipe("shapes"), "test")
    (folder / "answers.jsonl").write_text(
        "".join(json.dumps({"question_id": name, "text": "circle"}) + "\n" for name in data.ids)
    )
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder / "old", filter="data")
    commands = {
        "--help": [TRAIN, "--help"],
        "train --help": [TRAIN, "train", "--help"],
        "predict --help": [EVAL, "predict", "--help"],
        "matrix": [EVAL, "matrix", str(folder / "matrix.json")],
        "data check": [EVAL, "data", "check", "shapes", "--split", "test"],
        "score": [EVAL, "score", "--task", "shapes", "--predictions", str(folder / "answers.jsonl")],
        "list": [TRAIN, "list"],
        "doctor": [TRAIN, "doctor", "run-clip"],
        "bitsandbytes": ["llava_keeplora.bitsandbytes_import:import_bitsandbytes"],
        "plan": [TRAIN, "plan", "--config", "demo", "sequence=null", "tasks=[shapes]"],
        "train": ["llava_keeplora.sequence"],
    }
    return dict(zip(commands, heavy_after(commands.values(), folder / "old"), strict=True))


@pytest.mark.parametrize(
    "command", ["--help", "train --help", "predict --help", "matrix", "data check", "score"]
)
def test_help_a_matrix_and_rendered_data_need_no_heavy_library(imported, command):
    assert not imported[command]


def test_the_list_of_methods_needs_torch_and_nothing_more(imported):
    assert imported["list"] == {"torch"}


def test_a_recorded_run_is_examined_without_the_library_that_trains(imported):
    assert imported["doctor"] == {"torch"}


def test_bitsandbytes_is_imported_without_the_compiler(imported):
    assert imported["bitsandbytes"] == {"torch", "bitsandbytes"}


def test_a_plan_neither_draws_nor_scores(imported):
    assert not imported["plan"] & {"matplotlib", "evaluate", "deepspeed", "torch._inductor.compile_fx"}


def test_a_run_draws_and_scores_without_waiting_at_its_start(imported):
    # The Trainer brings in the others.
    assert not imported["train"] & {"matplotlib", "evaluate", "deepspeed"}


def test_a_command_that_loads_no_configuration_before_its_run_starts_without_the_compiler(tmp_path):
    (tmp_path / "extends.py").write_text(
        "from llava_keeplora.cli.run_sequence import prepared_process\nwith prepared_process():\n    pass\n"
    )
    (modules,) = heavy_after([["extends"]], tmp_path)
    assert "peft" in modules and "torch._inductor.compile_fx" not in modules
