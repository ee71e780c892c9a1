"""One command, three doors: the same numbers whatever starts a run, in one process or two, killed or not."""

import json
import random
import signal
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file

import forked
from llava_keeplora_eval.files import file_hash

CLI = [sys.executable, "-m", "llava_keeplora.cli", "train"]
ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


@pytest.fixture(scope="session")
def numbers():
    """Function (run folder) → every artefact that a method wrote, as its hash."""
    kinds = ("*/matrix.json", "*/task-*/*.safetensors", "*/task-*/*.json", "*/task-*/predictions/*.jsonl")
    return lambda root: {
        str(p.relative_to(root)): file_hash(p) for kind in kinds for p in sorted(root.glob(kind))
    }


@pytest.fixture(scope="module")
def reference(run_config, driven, tiny_tasks, tmp_path_factory):
    """The same run inside this process."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    return driven(run_config(folder, methods={"keeplora": {}}, tasks=[str(p) for p in tiny_tasks[:2]]))


@pytest.mark.slow
def test_the_launcher_gives_the_same_numbers_and_a_quiet_terminal(
    config_file, launch, launcher, script, numbers, reference, tmp_path
):
    code, out, err = launch(
        [*launcher(1), script], "--config", config_file(), "--output-dir", tmp_path / "run"
    )
    assert code == 0, err
    assert numbers(tmp_path / "run") == numbers(reference)
    assert f"run folder: {tmp_path / 'run'}" in out and (tmp_path / "run/report.html").is_file()
    assert not [
        noise for noise in ("Traceback", "gemm_4bit", "Loading weights", "FutureWarning") if noise in err
    ], err


@pytest.mark.slow
def test_a_run_killed_in_training_and_gone_on_with_through_another_door_gives_the_same_numbers(
    config_file, start, launch, script, numbers, reference, tmp_path
):
    arguments = ["--config", config_file(), "--output-dir", tmp_path / "run"]
    process = start([sys.executable, script], *arguments)
    journal, deadline = tmp_path / "run/keeplora/journal.jsonl", time.monotonic() + forked.patience()
    while not (journal.exists() and "PREPARED" in journal.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    delay = random.uniform(0, 1)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, _, err = launch(CLI, *arguments)
    assert code == 0, err
    assert numbers(tmp_path / "run") == numbers(reference), (
        f"killed {delay:.3f} s after the first task was prepared"
    )


@pytest.mark.slow
def test_zero_2_from_a_plain_start_learns_the_same(config_file, launch, script, reference, tmp_path):
    (tmp_path / "zero2.json").write_text(json.dumps(ZERO_2))
    arguments = [
        "--config",
        config_file(),
        "--output-dir",
        tmp_path / "run",
        f"training.deepspeed={tmp_path / 'zero2.json'}",
    ]
    code, _, err = launch([sys.executable, script], *arguments)
    assert code == 0, err
    same_up_to_rounding(reference, tmp_path / "run")


# Ends a process other than the first as soon as it opens a file of the run folder for writing, but for its share of answers.
WATCHED = """
import os, runpy, sys
folder = sys.argv[sys.argv.index("--output-dir") + 1]
def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith(folder) and ".shard-" not in str(arguments[0]) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        sys.stderr.write(f"process {os.environ['RANK']} writes {arguments[0]}\\n")
        os._exit(9)
if os.environ["RANK"] != "0":
    sys.addaudithook(watch)
runpy.run_path(SCRIPT, run_name="__main__")
"""


@pytest.fixture
def watched(script, tmp_path):
    path = tmp_path / "watched.py"
    path.write_text(textwrap.dedent(WATCHED).replace("SCRIPT", repr(str(script))))
    return path


@pytest.mark.parametrize("zero", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "zero-2"])
def test_two_processes_learn_what_one_learns_and_the_first_alone_writes_but_for_shares_of_answers(
    zero, config_file, launch, reference, watched, numbers, tmp_path
):
    (tmp_path / "zero2.json").write_text(json.dumps(ZERO_2))
    more = [f"training.deepspeed={tmp_path / 'zero2.json'}"] if zero else []
    arguments = [
        "--config",
        config_file(),
        "--output-dir",
        tmp_path / "run",
        "training.per_device_train_batch_size=4",
        *more,
    ]
    code, out, err = launch([sys.executable, watched], *arguments, processes=2)
    assert code == 0, err
    assert err.count("zero-shot: ") == 1 and out.count("run folder: ") == 1
    assert numbers(tmp_path / "run").keys() == numbers(reference).keys()
    same_up_to_rounding(reference, tmp_path / "run")


def same_up_to_rounding(one, two):
    """The first task's subspaces and delta, and W_p, agree within 1e-4."""
    for name in ("task-00-base/state", "task-01-colours/adapters", "task-01-colours/state"):
        a, b = (load_file(run / f"keeplora/{name}.safetensors") for run in (one, two))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.linalg.norm(projector(a[key]) - projector(b[key])) < 1e-4, (name, key)
    a, b = (load_file(run / "keeplora/task-01-colours/delta.safetensors") for run in (one, two))
    for key in a:
        if key.endswith(".B"):
            x, y = (d[key] @ d[key[:-1] + "A"] for d in (a, b))
            assert torch.linalg.norm(x - y) < 1e-4 * torch.linalg.norm(x), key


def projector(basis):
    """Onto the span of a basis, stored as columns or, for an adapter's A, as rows."""
    columns = basis if basis.shape[0] >= basis.shape[1] else basis.T
    return columns @ columns.T


@pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ranks", "deepspeed"]
)
def test_a_first_process_that_fails_at_the_start_takes_the_others_with_it(
    config_file, launch, launcher, script, tmp_path, real
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    command, count = ([*launcher(2), script], 1) if real else ([sys.executable, script], 2)
    arguments = ["--config", config_file(), "--output-dir", tmp_path / "run"]
    code, _, err = launch(command, *arguments, processes=count)
    assert code != 0
    assert (
        err.count("error: ") == 1
        and "is not a run folder but holds notes.txt" in err
        and "Traceback" not in err
    )


def test_processes_know_how_many_share_their_machine(launch, tmp_path):
    script = tmp_path / "count.py"
    script.write_text(
        "import torch.distributed as dist\nfrom llava_keeplora.distributed import processes_here\n"
        "dist.init_process_group('gloo')\nprint(f'{processes_here()} here', flush=True)\ndist.destroy_process_group()\n"
    )
    code, out, err = launch([sys.executable, script], processes=2)
    assert code == 0, err
    assert out.count("2 here") == 2
