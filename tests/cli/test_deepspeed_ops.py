"""DeepSpeed's operators: a lock that a killed build left behind, and the one that training does without."""

import importlib
import os
import sys
import time

import pytest

import forked
from llava_keeplora import cli
from llava_keeplora.deepspeed_ops import LONGEST, check_builds, skip_shared_memory_op, unheld_locks
from llava_keeplora.errors import RunError

BUILD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A lock that torch itself took, and its process."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    path = tmp_path / "cpu_adam" / "lock"
    builder = forked.Forked([sys.executable, "-c", BUILD, path])
    while not builder.output(0):
        assert builder.returncode is None, builder.output(1)
        time.sleep(0.01)
    yield path, builder
    builder.kill()
    builder.wait()


def left_behind(lock, seconds):
    path, builder = lock
    builder.kill()
    builder.wait()
    os.utime(path, (time.time() - seconds,) * 2)
    return path


@pytest.mark.slow
def test_a_build_at_work_is_waited_for(lock, caplog):
    assert unheld_locks() == []
    check_builds()
    assert not caplog.records


def test_a_young_lock_without_a_process_is_reported_and_waited_for(lock, caplog):
    path = left_behind(lock, 60)
    check_builds()
    (record,) = caplog.records
    assert (
        str(path) in record.getMessage()
        and "1 minutes old, but no process here is compiling it" in record.getMessage()
    )


def test_an_old_one_is_refused_with_the_file_to_remove(lock):
    path = left_behind(lock, LONGEST + 1)
    with pytest.raises(RunError, match="so a start would wait for it for ever; remove it: rm ") as caught:
        check_builds()
    assert str(caught.value).endswith(f"rm {path}.")


def test_a_start_with_deepspeed_says_it_at_once_instead_of_waiting(lock, run_tree, tmp_path, capsys):
    import yaml

    path = left_behind(lock, LONGEST + 1)
    (tmp_path / "zero.json").write_text(
        '{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}'
    )
    tree = run_tree(tmp_path / "run")
    tree["training"]["deepspeed"] = str(tmp_path / "zero.json")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert f"rm {path}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_group_of_cpu_processes_is_set_up_without_a_compiler(monkeypatch):
    deepspeed = pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    # By its name, as the attribute `torch` of that package is torch itself.
    backend = importlib.import_module("deepspeed.comm.torch")
    built = []
    monkeypatch.setattr(ShareMemCommBuilder, "load", lambda self: built.append(self.NAME) or self)
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, ShareMemCommBuilder.NAME, True)
    assert backend.build_shm_op() and built, "DeepSpeed itself compiles it"
    built.clear()
    skip_shared_memory_op()
    assert backend.build_shm_op() is None and not built
