"""Any number of processes, any ZeRO stage: three tasks end in the same deltas and bases as in one process."""

import json
import math
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

import forked
from llava_keeplora.config import parse_config
from llava_keeplora.methods import METHODS
from llava_keeplora_eval import Matrix

BATCH = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
HOST = {"device": "cpu"}
#: What users have: the JSON files of the transformers documentation, cut down to what matters here.
ZERO = {
    "zero-1": {"zero_optimization": {"stage": 1}},
    "zero-2": {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
    "zero-3": {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        }
    },
    "zero-2-offload": {"zero_optimization": {"stage": 2, "offload_optimizer": HOST}, "optimizer": ADAMW},
    "zero-3-offload": {
        "zero_optimization": {"stage": 3, "offload_optimizer": HOST, "offload_param": HOST},
        "optimizer": ADAMW,
    },
}
#: Rounding differs from process to process, and AdamW makes a step of the full rate out of a gradient that is nothing but
#: rounding; a larger epsilon keeps such a step as small as its gradient. With 1e-3 the difference grew from task to task, to 1.0e-5 on
#: one machine; with this it stays at 3e-6.
STEADY = {"adam_epsilon": 1e-2, "num_train_epochs": 1}


UNDRAWN = """
import runpy
from llava_keeplora.sequence import runner
runner.write_run_report = lambda root: None
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def script(script, tmp_path_factory):
    """scripts/train_seq.py without the report, which takes a quarter of a small run's time."""
    path = tmp_path_factory.mktemp("script") / "train_seq.py"
    path.write_text(UNDRAWN.format(script=str(script)))
    return path


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def trees(run_tree, llava_tree):
    """Family → a run of three tasks."""
    return {
        "clip": lambda **changes: run_tree("unset", methods={"keeplora": {}}, training=STEADY, **changes),
        "llava": lambda **changes: llava_tree(
            "unset", training=STEADY, parts={"projector": {"learning_rate": None}}, **changes
        ),
    }


@pytest.fixture(scope="module")
def references(trees, driven, tmp_path_factory):
    """Family → the same run in one process, without DeepSpeed."""
    done = {}

    def reference(family):
        if family not in done:
            folder = tmp_path_factory.mktemp(family) / "run"
            done[family] = driven(parse_config(trees[family]() | {"output_dir": str(folder)}))
        return done[family]

    return reference


def halved(tree):
    tree["training"]["per_device_train_batch_size"] //= 2
    return tree


def distances(one, two, label="keeplora", worst=1e-4):
    """Relative distances of two runs, (task, delta or state) → ‖x − y‖ / ‖x‖ over all layers: of ΔW, and of the projectors onto the bases as
    they are after the task, of which a state has the columns that it added.

    No single layer may be further away than `worst`. There a layer counts as no smaller than a thousandth of the largest one: what has no
    effect, as k's bias in an attention, learns nothing but rounding.
    """
    found, grown = {}, ({}, {})
    for folder in sorted(p.name for p in (one / label).glob("task-*")):
        for name in ("delta", "state"):
            paths = [run / label / folder / f"{name}.safetensors" for run in (one, two)]
            assert paths[0].exists() == paths[1].exists(), (folder, name)
            if paths[0].exists():
                a, b = (matrices(name, load_file(path)) for path in paths)
                assert {key: x.shape for key, x in a.items()} == {key: x.shape for key, x in b.items()}
                if name == "state":
                    for basis, new in zip(grown, (a, b)):
                        basis.update({key: basis.get(key, 0) + x for key, x in new.items()})
                    a, b = grown
                floor = 1e-3 * max(x.norm() for x in a.values())
                each = {key: float((x - b[key]).norm() / x.norm().clamp_min(floor)) for key, x in a.items()}
                assert max(each.values()) < worst, (folder, name, each)
                apart = sum(float((x - b[key]).square().sum()) for key, x in a.items())
                found[folder, name] = (apart / sum(float(x.square().sum()) for x in a.values())) ** 0.5
    return found


def rounding(run, base, label, task):
    """The part of a whole model's update that float32 cannot hold: ε ‖W‖ / ‖ΔW‖, as an update is the difference of two weights."""
    update = load_file(run / label / task / "delta.safetensors").values()
    norms = [
        sum(float(x.double().square().sum()) for x in tensors) ** 0.5
        for tensors in (load_file(base / "model.safetensors").values(), update)
    ]
    return torch.finfo(torch.float32).eps * norms[0] / norms[1]


def answers(run, label="keeplora"):
    """Every answer after every task: file → example → answer."""
    files = sorted((run / label).glob("task-*/predictions/*.jsonl"))
    rows = {
        str(path.relative_to(run)): [json.loads(line) for line in path.read_text().splitlines()]
        for path in files
    }
    assert rows
    return {name: {row["id"]: row["text"] for row in found} for name, found in rows.items()}


def matrices(name, tensors):
    """What a file's tensors mean, whatever basis they are written in: ΔW / s by layer, or the projectors onto the spans."""
    tensors = {key: value.double() for key, value in tensors.items()}
    if name == "state":
        return {key: basis @ basis.T for key, basis in tensors.items()}
    products = {key: tensors[key] @ tensors[key[:-1] + "A"] for key in tensors if key.endswith(".B")}
    return products | {key: value for key, value in tensors.items() if key.endswith((".weight", ".bias"))}


EVERY = [(family, stage) for family in ("clip", "llava") for stage in (None, *ZERO)]
QUICK = [("clip", "zero-2"), ("llava", "zero-3")]


@pytest.mark.parametrize(
    ("family", "stage"), [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in EVERY]
)
def test_three_tasks_in_two_processes_end_as_in_one(
    family, stage, trees, written, references, launch, script, tmp_path
):
    path = written(halved(trees[family]()), ZERO.get(stage))
    code, _, err = launch(
        [sys.executable, script], "--config", path, "--output-dir", tmp_path / "run", processes=2
    )
    assert code == 0, err
    apart = distances(references(family), tmp_path / "run")
    assert {task for task, _ in apart} == {p.name for p in (tmp_path / "run/keeplora").glob("task-*")}
    assert max(apart.values()) < 1e-5, apart
    assert answers(references(family)) == answers(tmp_path / "run")


SKETCHED = """
import math, runpy
from llava_keeplora.methods import presets
from llava_keeplora.subspace import gradient_sketch
gradient_sketch.WORTH = presets.EXACT = math.inf
runpy.run_path({script!r}, run_name="__main__")
"""


def test_sketches_of_gradients_and_features_add_up_over_processes(
    trees, tiny_tasks, written, driven, launch, script, tmp_path, monkeypatch
):
    # Sketches on layers this small, of 19 directions where the inputs have 32; both kinds ask for further passes.
    (tmp_path / "sketched.py").write_text(SKETCHED.format(script=str(script)))
    monkeypatch.setattr("llava_keeplora.subspace.gradient_sketch.WORTH", math.inf)
    monkeypatch.setattr("llava_keeplora.methods.presets.EXACT", math.inf)
    parts = {part: {"energy_feature": 0.98} for part in ("vision", "text")}
    tree = trees["clip"](
        memory={"statistics_gb": 1.2e-4}, parts=parts, tasks=[str(path) for path in tiny_tasks[:2]]
    )
    driven(parse_config(tree | {"output_dir": str(tmp_path / "1")}))
    code, _, err = launch(
        [sys.executable, tmp_path / "sketched.py"],
        "--config",
        written(halved(tree)),
        "--output-dir",
        tmp_path / "2",
        processes=2,
    )
    assert code == 0, err
    # A basis ends between eigenvalues of a sketch that may lie near each other, which makes rounding larger by as much: some 1e-4 at times.
    apart = distances(tmp_path / "1", tmp_path / "2", worst=1e-3)
    assert max(apart.values()) < 1e-4, apart

    def read(name):
        return [
            json.loads(path.read_text())
            for path in sorted((tmp_path / "2/keeplora").glob(f"task-0[123]-*/{name}.json"))
        ]

    gradients = [one["passes"] for task in read("prepared") for one in task["report"]["gradient"].values()]
    features = [one["passes"] for task in read("consolidated") for one in task["feature_energy"].values()]
    assert len(gradients) == len(features) == 2 * 16 and 2 in gradients and 2 in features, (
        "all are sketched, and both kinds took a second pass"
    )


#: Methods that draw nothing while they train, and those whose gates do.
CERTAIN = {
    "seq-lora": {},
    "keeplora+": {},
    "keeplora++": {},
    "o-lora": {"dropout": 0.0},
    "inflora": {},
    "sd-lora": {},
    "zscl": {},
}
DRAWING = {"moe-adapters": {"experts": 4}, "iap": {}}


@pytest.mark.parametrize(
    "stage", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero-1", "zero-2"))]
)
def test_every_other_method_ends_in_two_processes_as_in_one(
    stage, run_tree, tiny_clip, tiny_tasks, written, driven, launch, script, tmp_path
):
    methods = {**CERTAIN, **DRAWING, "zscl": {"reference": str(tiny_tasks[2])}}
    tree = run_tree(
        tmp_path / "one", methods=methods, tasks=[str(path) for path in tiny_tasks[:2]], training=STEADY
    )
    driven(parse_config({**tree, "methods": {label: methods[label] for label in CERTAIN}}))
    code, _, err = launch(
        [sys.executable, script],
        "--config",
        written(halved(tree), ZERO.get(stage)),
        "--output-dir",
        tmp_path / "two",
        processes=2,
    )
    assert code == 0, err
    for label in CERTAIN:
        apart = distances(tmp_path / "one", tmp_path / "two", label)
        limits = {
            key: 1e-5
            + (
                rounding(tmp_path / "one", tiny_clip, label, key[0])
                if METHODS[label].full_finetuning
                else 0.0
            )
            for key in apart
        }
        assert len(apart) >= 2 and all(apart[key] < limits[key] for key in apart), (label, apart, limits)
    for path in (tmp_path / "one").glob("*/task-*/kept.safetensors"):
        own, theirs = load_file(path), load_file(tmp_path / "two" / path.relative_to(tmp_path / "one"))
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-4)
    for label in DRAWING:
        matrix = Matrix.from_json(tmp_path / "two" / label / "matrix.json")
        kept = [
            load_file(path)
            for path in sorted((tmp_path / "two" / label).glob("task-0[12]*/kept.safetensors"))
        ]
        assert (
            matrix.complete
            and len(kept) == 2
            and all(torch.isfinite(value).all() for tensors in kept for value in tensors.values())
        )


def test_a_second_task_starts_from_the_weights_and_not_from_the_engine_of_the_first(
    run_tree, tiny_tasks, written, driven, launch, script, tmp_path
):
    # ZSCL trains the model's own parameters and leaves a mean of theirs, where the engine ended with the last step's.
    methods = {"zscl": {"reference": str(tiny_tasks[2])}}
    tree = run_tree(
        tmp_path / "plain", methods=methods, tasks=[str(path) for path in tiny_tasks[:2]], training=STEADY
    )
    driven(parse_config(tree))
    code, _, err = launch(
        [sys.executable, script], "--config", written(tree, ZERO["zero-2"]), "--output-dir", tmp_path / "zero"
    )
    assert code == 0, err
    apart = distances(tmp_path / "plain", tmp_path / "zero", "zscl")
    assert len(apart) == 2 and max(apart.values()) < 1e-5, apart


@pytest.fixture
def one_and_two(trees, written, driven, launch, script, tmp_path):
    """Function (stage, **changes) → distances of a LLaVA run in two processes from the same in one."""

    def measure(stage, **changes):
        driven(parse_config(trees["llava"](**changes) | {"output_dir": str(tmp_path / "one")}))
        path = written(halved(trees["llava"](**changes)), ZERO[stage])
        code, _, err = launch(
            [sys.executable, script], "--config", path, "--output-dir", tmp_path / "two", processes=2
        )
        assert code == 0, err
        return distances(tmp_path / "one", tmp_path / "two")

    return measure


def test_the_literal_form_ends_as_in_one_process_under_zero_3(one_and_two, mixed_tasks):
    # B starts above zero: DeepSpeed's own copies of B have to start there too, and the shards' weights are W − s B₀ A.
    apart = one_and_two(
        "zero-3", methods={"keeplora": {"form": "literal"}}, tasks=[str(path) for path in mixed_tasks[:2]]
    )
    assert apart and max(apart.values()) < 1e-5, apart


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
        written(halved(trees["clip"]()), zero),
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
        [sys.executable, script], "--config", written(trees["clip"](), zero), "--output-dir", tmp_path / "run"
    )
    assert code == 0, err
    apart = distances(references("clip"), tmp_path / "run")
    assert max(apart.values()) < 1e-5, apart


UNEQUAL = [
    ("clip", 4, "zero-3"),
    ("clip", 1, "zero-3"),
    ("clip", 4, None),
    ("llava", 1, "zero-3"),
    ("llava", 4, "zero-2"),
]


@pytest.mark.parametrize(
    ("family", "gone", "stage"),
    [pytest.param(*one, marks=() if one == UNEQUAL[0] else pytest.mark.slow) for one in UNEQUAL],
)
def test_processes_with_unequal_shares_of_the_data_never_wait_for_each_other_for_ever_and_learn_what_one_learns(
    family, gone, stage, trees, written, driven, launch, script, own_tasks, tmp_path
):
    # 23 or 20 examples for two processes in batches of 4: the last step has 4 and 3 of them, or 4 and none. 7 to be answered one by one.
    for image in sorted((own_tasks[0].parent / "colours/train/red").iterdir())[:gone]:
        image.unlink()
    next((own_tasks[0].parent / "colours/test/red").iterdir()).unlink()
    tree = trees[family](tasks=[str(own_tasks[0])], evaluation={"batch_size": 1})
    driven(parse_config({**tree, "output_dir": str(tmp_path / "one")}))
    code, _, err = launch(
        [sys.executable, script],
        "--config",
        written(halved(tree), ZERO.get(stage)),
        "--output-dir",
        tmp_path / "run",
        processes=2,
    )
    assert code == 0, err
    predictions = (
        (tmp_path / "run/keeplora/task-01-colours/predictions/colours.jsonl").read_text().splitlines()
    )
    assert len({json.loads(line)["id"] for line in predictions}) == len(predictions) == 7
    apart = distances(tmp_path / "one", tmp_path / "run")
    assert len(apart) >= 2 and max(apart.values()) < 1e-5, apart


@pytest.mark.slow
def test_a_quantised_base_under_zero_2_ends_as_in_one_process(one_and_two):
    apart = one_and_two("zero-2", model={"quantization": "nf4"})
    assert apart and max(apart.values()) < 1e-5, apart


@pytest.mark.slow
def test_a_bf16_run_on_two_nodes_of_a_hostfile_learns_under_zero_3(
    trees, written, start, launcher, script, tmp_path
):
    # In bf16 the processes' sums round differently, so only what must hold in any precision is asked.
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    tree = halved(trees["llava"](model={"dtype": "bfloat16"}))
    tree["training"]["bf16"] = True
    path = written(tree, ZERO["zero-3"] | {"bf16": {"enabled": "auto"}})
    # Without ssh, DeepSpeed's launcher is started on every node by hand.
    deepspeed, *_, port = launcher(1)
    common = [
        deepspeed,
        "--hostfile",
        tmp_path / "hosts",
        "--no_ssh",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        port,
    ]
    nodes = [
        start(
            [*map(str, common), "--node_rank", str(rank), str(script)],
            "--config",
            path,
            "--output-dir",
            tmp_path / "run",
        )
        for rank in (0, 1)
    ]
    for node in nodes:
        _, err = node.communicate(timeout=forked.patience())
        assert node.returncode == 0, err
    folders = sorted((tmp_path / "run/keeplora").glob("task-0[123]-*"))
    assert len(folders) == 3
    for folder in folders:
        delta, begun = load_file(folder / "delta.safetensors"), load_file(folder / "adapters.safetensors")
        assert any(bool(value.any()) for key, value in delta.items() if key.endswith(".B"))
        for key, A in begun.items():
            assert float((A @ A.T - torch.eye(len(A))).norm()) < 1e-5, key
        for key, basis in load_file(folder / "state.safetensors").items():
            assert float((basis.T @ basis - torch.eye(basis.shape[1])).norm()) < 1e-5, key


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
    [
        pytest.param(
            *one, id="-".join((*one[:2], *one[2])), marks=() if one == WITHIN[0] else pytest.mark.slow
        )
        for one in WITHIN
    ],
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
