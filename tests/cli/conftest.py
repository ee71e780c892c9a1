"""A run of KeepLoRA on two tasks as a YAML file, and the doors that a run starts through."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import forked

BIN = Path(sys.executable).parent
SCRIPT = Path(__file__).parents[2] / "scripts" / "train_seq.py"
FORKED = (sys.executable, "llava-keeplora", "llava-keeplora-eval")


@pytest.fixture
def config_file(run_tree, tiny_tasks, tmp_path):
    """Function (**changes) → a YAML of KeepLoRA on two tasks."""

    def write(**changes):
        path = tmp_path / "run.yaml"
        changes = {"methods": {"keeplora": {}}, "tasks": [str(p) for p in tiny_tasks[:2]]} | changes
        path.write_text(yaml.safe_dump(run_tree("unset", **changes)))
        return path

    return write


@pytest.fixture(scope="session")
def script():
    """scripts/train_seq.py."""
    return SCRIPT


@pytest.fixture(scope="session")
def launcher():
    """Function (processes) → the start of a DeepSpeed command."""
    return lambda processes: [
        str(BIN / "deepspeed"),
        "--num_gpus",
        str(processes),
        "--master_port",
        str(forked.free_port()),
    ]


@pytest.fixture(scope="session")
def start():
    """Function (command, *arguments) → a process of its own: forked for `python` and the installed commands, else a real start."""

    def run(command, *arguments):
        words = [*map(str, command), *map(str, arguments)]
        if words[0] in FORKED:
            return forked.Forked(words)
        environment = {k: v for k, v in os.environ.items() if k not in forked.LAUNCHED}
        environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
        return subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    return run


@pytest.fixture(scope="session")
def launch(start):
    """Function (command, *arguments, processes) → (exit code, stdout, stderr); several processes are forked ranks without a launcher."""

    def run(command, *arguments, processes=1, timeout=None):
        if processes > 1:
            return forked.run([*command, *arguments], timeout, processes)
        process = start(command, *arguments)
        try:
            out, err = process.communicate(timeout=timeout or forked.patience())
        finally:
            process.kill()
        return process.returncode, out, err

    return run
