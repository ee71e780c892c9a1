"""A script of a user's that calls `Run`, started by a launcher on two processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava_keeplora import Run
from llava_keeplora.adapters import load_deltas

SCRIPT = Path(__file__).with_name("run_script.py")
ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
}


def launch(command, config, task, folder):
    (folder / "config.json").write_text(json.dumps(config))
    command = [*command, SCRIPT, folder / "config.json", task]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [ZERO_2, None], ids=["zero-2", "torchrun"])
def test_two_processes_train_and_extend_what_one_does(run_tree, tiny_tasks, driven, tmp_path, deepspeed):
    """Eight examples a step: one process takes them at once, two take four each."""
    programs = Path(sys.executable).parent
    changes = {"methods": {"keeplora": {}}, "tasks": [str(tiny_tasks[0])]}
    (tmp_path / "two").mkdir()
    two = run_tree(tmp_path / "two/run", **changes)
    two["training"] |= {"per_device_train_batch_size": 4} | ({"deepspeed": deepspeed} if deepspeed else {})
    launcher = (
        [programs / "deepspeed", "--num_accelerators", "2", "--master_port", "29731"]
        if deepspeed
        else [programs / "torchrun", "--nproc_per_node", "2", "--master_port", "29732"]
    )
    launch(launcher, two, str(tiny_tasks[1]), tmp_path / "two")
    run = Run(run_tree(tmp_path / "one", **changes))
    run.train()
    run.extend(str(tiny_tasks[1]), num_train_epochs=1)
    for task in ("task-01-colours", "task-02-stripes"):
        one, other = (
            load_deltas(folder / "keeplora" / task / "delta.safetensors")
            for folder in (tmp_path / "one", tmp_path / "two/run")
        )
        assert one.keys() == other.keys()
        for name, delta in one.items():
            expected = delta.dense()
            assert float((other[name].dense() - expected).norm() / expected.norm()) < 0.05
    assert (
        json.loads((tmp_path / "two/run/seen.json").read_text())
        == Run.open(tmp_path / "two/run").matrix["keeplora"].rows
    )
