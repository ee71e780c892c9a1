"""A run of KeepLoRA on two tasks as a YAML file, and the doors that a run starts through."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

BIN = Path(sys.executable).parent
SCRIPT = Path(__file__).parents[2] / "scripts" / "train_seq.py"
#: Seconds; a start takes some ten on a quiet machine.
PATIENCE = 400


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
    return lambda processes: [str(BIN / "deepspeed"), "--num_gpus", str(processes), "--master_port", str(free_port())]


def free_port() -> int:
    """Another suite may be running on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def start():
    """Function (command, *arguments) → a process of its own, its output in pipes."""

    def run(command, *arguments):
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")}
        environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
        return subprocess.Popen([*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    return run


@pytest.fixture(scope="session")
def launch(start):
    """Function (command, *arguments) → (exit code, stdout, stderr)."""

    def run(command, *arguments, timeout=PATIENCE):
        process = start(command, *arguments)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return process.returncode, out, err

    return run
