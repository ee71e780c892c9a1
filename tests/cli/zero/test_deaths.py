"""A process that dies takes the others along, and the run goes on as if it had never stopped."""

import json
import sys

import pytest

from zero_runs import ZERO, distances, first_tasks, halved

WOUNDED = """
import os, runpy, signal
from llava_keeplora.errors import RunError
from llava_keeplora.run_folder import Stage
from llava_keeplora.sequence.stages import STAGES
stage = STAGES[Stage("{stage}".upper())]
def wounded(state, index):
    if index == 2 and os.environ["RANK"] == "{rank}":
        {wound}
    return stage(state, index)
STAGES[Stage("{stage}".upper())] = wounded
runpy.run_path({script!r}, run_name="__main__")
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
REFUSED = 'raise RunError("the disk of this process is full", "make room and run the same command again")'


@pytest.fixture
def wounded(script, tmp_path):
    """Function (stage, wound, rank) → train_seq.py in which a process gets the wound in a stage of the second task."""

    def write(stage, wound, rank):
        path = tmp_path / "wounded.py"
        path.write_text(WOUNDED.format(stage=stage, wound=wound, rank=rank, script=str(script)))
        return path

    return write


DEATHS = [
    ("prepared", REFUSED, 1),
    ("trained", KILLED, 0),
    ("prepared", KILLED, 1),
    ("consolidated", KILLED, 0),
    ("evaluated", KILLED, 1),
    ("evaluated", REFUSED, 0),
]


@pytest.mark.parametrize(
    ("stage", "wound", "rank"),
    [
        pytest.param(
            *one,
            id=f"{one[0]}-{'killed' if one[1] is KILLED else 'refused'}-{one[2]}",
            marks=() if one == DEATHS[0] else pytest.mark.slow,
        )
        for one in DEATHS
    ],
)
def test_a_process_that_dies_takes_the_others_along_and_the_run_goes_on_with_any_number_of_processes(
    stage, wound, rank, wounded, trees, written, references, launch, script, tmp_path
):
    zero = ZERO["zero-2"]
    code, _, err = launch(
        [sys.executable, wounded(stage, wound, rank)],
        "--config",
        written(halved(first_tasks(trees["clip"](), 2)), zero),
        "--output-dir",
        tmp_path / "run",
        processes=2,
    )
    assert code != 0
    assert (err.count("error: the disk of this process is full; make room") == 1) == (wound is REFUSED), err
    done = [
        (e["task"], e["stage"])
        for e in map(json.loads, (tmp_path / "run/keeplora/journal.jsonl").read_text().splitlines())
    ]
    assert (1, "CLOSED") in done and (2, stage.upper()) not in done
    # One process alone, at the same number of examples per step.
    code, _, err = launch(
        [sys.executable, script],
        "--config",
        written(first_tasks(trees["clip"](), 2), zero),
        "--output-dir",
        tmp_path / "run",
    )
    assert code == 0, err
    apart = distances(references("clip", 2), tmp_path / "run")
    assert max(apart.values()) < 1e-5, apart


COUNTED = """
import os, runpy, signal
from llava_keeplora.sequence.trainer import TaskTrainer
step = TaskTrainer.training_step
def counted(self, *args, **kwargs):
    if os.environ["RANK"] == "1":
        with open({log!r}, "a") as file:
            file.write(f"{{self.ctx.index}} {{self.state.global_step}}\\n")
        if (self.ctx.index, self.state.global_step) == {fatal}:
            os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
TaskTrainer.training_step = counted
runpy.run_path({script!r}, run_name="__main__")
"""
WITHIN = [
    ("clip", "zero-2", {}),
    ("llava", "zero-3", {}),
    ("clip", "zero-1", {}),
    ("llava", "zero-2-offload", {}),
    ("llava", "zero-3-offload", {}),
    ("clip", "zero-1", {"bf16": True}),
]


@pytest.mark.parametrize(
    ("family", "stage", "training"),
    [pytest.param(*one, id="-".join((*one[:2], *one[2])), marks=pytest.mark.slow) for one in WITHIN],
)
def test_a_process_killed_between_steps_goes_on_from_the_last_checkpoint(
    family, stage, training, trees, written, launch, script, tmp_path
):
    def run(name, fatal=None):
        tree = trees[family]()
        tree = halved(tree | {"tasks": tree["tasks"][:2]})
        # Small batches, so that there are steps enough.
        tree["training"] |= {"per_device_train_batch_size": 1, "save_steps": 2, **training}
        wounded, log = tmp_path / f"{name}-{bool(fatal)}.py", tmp_path / f"{name}-{bool(fatal)}.log"
        wounded.write_text(COUNTED.format(log=str(log), fatal=fatal, script=str(script)))
        code, _, err = launch(
            [sys.executable, wounded],
            "--config",
            written(tree, ZERO[stage]),
            "--output-dir",
            tmp_path / name,
            processes=2,
        )
        return code, err, [tuple(map(int, line.split())) for line in log.read_text().splitlines()]

    code, err, whole = run("whole")
    assert code == 0, err
    code, _, before = run("killed", fatal=(2, 3))
    assert code != 0 and before == whole[: whole.index((2, 3)) + 1]
    code, err, after = run("killed")
    assert code == 0, err
    assert after == whole[whole.index((2, 2)) :], "no step before the checkpoint is made again"
    apart = distances(tmp_path / "whole", tmp_path / "killed")
    # The host's AdamW multiplies β up from step to step and after a start takes a power of it: 1 − β₂ᵗ is small, and magnifies its last bit.
    assert {task for task, _ in apart} == {p.name for p in (tmp_path / "whole/keeplora").glob("task-*")}
    assert max(apart.values()) <= (1e-5 if "offload" in stage else 0), apart
    ours, theirs = (
        {
            p.relative_to(root): p
            for p in sorted((root / "keeplora").rglob("task-*/*.*"))
            if p.name != "scores.json"
        }
        for root in (tmp_path / "whole", tmp_path / "killed")
    )
    assert ours.keys() == theirs.keys()
    assert (
        "offload" in stage
        or [str(name) for name, path in ours.items() if path.read_bytes() != theirs[name].read_bytes()] == []
    )
