"""Any number of processes, any ZeRO stage: three tasks end in the same deltas and bases as in one process."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file

import forked
from llava_keeplora.config import parse_config
from llava_keeplora.methods import METHODS
from llava_keeplora_eval import Matrix
from zero_runs import STEADY, ZERO, answers, distances, first_tasks, halved, rounding

EVERY = [(family, stage) for family in ("clip", "llava") for stage in (None, *ZERO)]
# Its scale and bias are vectors of one number, and its pooling head reads a weight without calling the layer.
EVERY += [("siglip2", "zero-3")]
# Packed patches: rows of images are no examples.
EVERY += [("qwen2_5_vl", stage) for stage in (None, "zero-2", "zero-3")]
EVERY += [(kind, "zero-2") for kind in ("internvl", "paligemma")]
EVERY += [(kind, "zero-3") for kind in ("qwen3_vl", "gemma3")]
QUICK = [("clip", "zero-2")]


@pytest.mark.parametrize(
    ("family", "stage", "count"),
    [
        *((*one, 2) for one in QUICK),
        *(pytest.param(*one, 3, marks=pytest.mark.slow) for one in EVERY),
    ],
)
def test_tasks_in_two_processes_end_as_in_one(family, stage, count, trees, references, in_two, tmp_path):
    code, err = in_two(first_tasks(trees[family](), count), ZERO.get(stage))
    assert code == 0, err
    apart = distances(references(family, count), tmp_path / "two")
    assert {task for task, _ in apart} == {p.name for p in (tmp_path / "two/keeplora").glob("task-*")}
    assert max(apart.values()) < 1e-5, apart
    assert answers(references(family, count)) == answers(tmp_path / "two")


@pytest.mark.slow
def test_batches_accumulated_in_two_processes_train_as_one_batch(
    trees, driven, launch, written, script, tmp_path
):
    # 24 images in one step: two batches of 10, five of each in a process, and one of four, all in the first.
    tree = first_tasks(trees["clip"](), 1)
    tree["training"] = tree["training"] | {"per_device_train_batch_size": 24}
    driven(parse_config(tree | {"output_dir": str(tmp_path / "one")}))
    tree["training"] |= {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}
    code, _, err = launch(
        [sys.executable, script], "--config", written(tree), "--output-dir", tmp_path / "two", processes=2
    )
    assert code == 0, err
    apart = distances(tmp_path / "one", tmp_path / "two")
    assert max(apart.values()) < 1e-5, apart


SKETCHED = """
import math, runpy
from llava_keeplora.methods import presets
from llava_keeplora.subspace import gradient_sketch
gradient_sketch.WORTH = presets.EXACT = math.inf
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
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
#: Large enough that what is merged changes answers, where 2 leaves all of them the base's.
LARGE = {part: {"alpha": 16} for part in ("vision", "text")}
#: Later methods with what they need to draw nothing, and the stages that they run with; behind the marker alone.
LATER = {
    "bounded": ({"method": "keeplora", "update_bound": 0.01}, ("zero-2", "zero-3")),
    "nusa-cl": ({"dropout": 0.0}, ("zero-2", "zero-3")),
    "splitlora": ({}, ("zero-2", "zero-3")),
    "merge": ({}, ("zero-2", "zero-3")),
    "ties": ({"method": "merge", "rule": "ties", "parts": LARGE}, ("zero-2", "zero-3")),
    "task-lora": ({}, ("zero-2",)),
    "ewc": ({"strength": 1000.0}, ("zero-2",)),
    "reglora": ({"strength": 1.0}, ("zero-2",)),
    "lwf": ({}, ("zero-2", "zero-3")),
    "individual": ({}, ("zero-2", "zero-3")),
    "joint": ({}, ("zero-2", "zero-3")),
    "replay": ({"share": 0.3}, ("zero-2", "zero-3")),
    # DeepSpeed takes no optimiser of a method's own.
    "eblora": ({"dropout": 0.0}, ()),
    "osf": ({}, ()),
    # PEFT's form takes the Trainer's.
    "osf-peft": ({"method": "osf", "project_steps": False}, ("zero-2",)),
}
#: A decomposition turns where singular values of a small random weight lie near each other, and AdamW takes other steps in a turned basis: noise of 1e-7
#: in the first task's update becomes 1e-4 in the second's, in one process too.
TURNING = {"osf": 1e-3, "osf-peft": 1e-3}
DRAWING = {"moe-adapters": {"experts": 4}, "iap": {}}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, "zero-2"])
def test_a_router_that_two_processes_train_is_that_of_one(stage, trees, driven, in_two, tmp_path):
    router = {"examples": 4, "epochs": 3, "learning_rate": 1e-3, "rank": 3, "batch_size": 4}
    row = {"method": "task-lora", "routing": "model"} | {
        f"router_{key}": value for key, value in router.items()
    }
    tree = first_tasks(trees["llava"](methods={"asked": row}), 2)
    driven(parse_config(tree | {"output_dir": str(tmp_path / "one")}))
    code, err = in_two(tree, ZERO.get(stage))
    assert code == 0, err
    one, two = (
        load_file(*(tmp_path / run / "asked").glob("task-02-*/state.safetensors")) for run in ("one", "two")
    )
    assert one["router.examples"].equal(two["router.examples"])
    names = [key[:-2] for key in one if key.endswith(".B")]
    assert names and all(one[f"{name}.B"].any() for name in names)
    updates = [torch.cat([(x[f"{name}.B"] @ x[f"{name}.A"]).flatten() for name in names]) for x in (one, two)]
    assert float((updates[0] - updates[1]).norm() / updates[0].norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, "zero-1", "zero-2"])
def test_every_other_method_ends_in_two_processes_as_in_one(
    stage, run_tree, tiny_clip, tiny_tasks, driven, in_two, tmp_path
):
    methods = {**CERTAIN, **DRAWING, "zscl": {"reference": str(tiny_tasks[2])}}
    tree = run_tree(
        tmp_path / "one", methods=methods, tasks=[str(path) for path in tiny_tasks[:2]], training=STEADY
    )
    driven(parse_config({**tree, "methods": {label: methods[label] for label in CERTAIN}}))
    code, err = in_two(tree, ZERO.get(stage))
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "stage"), [(label, stage) for label, (_, stages) in LATER.items() for stage in (None, *stages)]
)
def test_every_later_method_ends_in_two_processes_as_in_one(
    label, stage, run_tree, tiny_tasks, driven, in_two, tmp_path
):
    methods, tasks = {label: LATER[label][0]}, [str(path) for path in tiny_tasks[:2]]
    tree = run_tree(tmp_path / "one", methods=methods, tasks=tasks, training=STEADY)
    driven(parse_config(tree))
    code, err = in_two(tree, ZERO.get(stage))
    assert code == 0, err
    # ZeRO-3's hooks copy what layers read together, so that each has a state of its own.
    names = ("delta",) if stage == "zero-3" else ("delta", "state")
    turned = TURNING.get(label, 0.0)
    apart = distances(tmp_path / "one", tmp_path / "two", label, worst=max(1e-4, turned), names=names)
    first, *later = apart.values()
    assert (
        len(later) >= (label != "joint") and first < 1e-5 and max(later, default=0.0) < max(1e-5, turned)
    ), apart
    if label == "ties":  # Its updates are those of `merge`; how they are merged shows in the answers alone.
        found = answers(tmp_path / "one", label)
        assert found == answers(tmp_path / "two", label)
        early, late = (
            {path.rpartition("/")[2]: a for path, a in found.items() if f"task-0{t}" in path} for t in (1, 2)
        )
        assert early.keys() == late.keys() and early != late


#: Forms of later methods that the names alone do not run; each as one row of the same run.
FORMS = {
    "protected": {"method": "individual", "of": "keeplora", "settings": {"gradient": "dense"}},
    "merge-wise-ft": {"method": "merge", "rule": "wise-ft"},
    "merge-condu": {"method": "merge", "rule": "condu"},
    "replay": {"share": 0.3, "general_ratio": 0.5},
}


def passes(run, label):
    """Kinds of passes of every stage, in order, with the examples that all processes sent through the model."""
    entries = [json.loads(line) for line in (run / label / "journal.jsonl").read_text().splitlines()]
    return [(entry["stage"], entry["info"].get("passes", {})) for entry in entries]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, "zero-2"])
@pytest.mark.parametrize("family", ["clip", "llava"])
def test_forms_of_later_methods_end_in_two_processes_as_in_one_with_as_many_passes(
    family, stage, trees, tiny_tasks, mixed_tasks, driven, in_two, tmp_path
):
    tasks = [str(path) for path in (tiny_tasks if family == "clip" else mixed_tasks)]
    forms = {**FORMS, "replay": {**FORMS["replay"], "general": tasks[2 if family == "clip" else 0]}}
    tree = trees[family](tasks=tasks[:2], methods=forms)
    driven(parse_config(tree | {"output_dir": str(tmp_path / "one")}))
    code, err = in_two(tree, ZERO.get(stage))
    assert code == 0, err
    for label in forms:
        apart = distances(tmp_path / "one", tmp_path / "two", label, names=("delta",))
        assert len(apart) >= 2 and max(apart.values()) < 1e-5, (label, apart)
        assert passes(tmp_path / "one", label) == passes(tmp_path / "two", label)
    assert any(counts.get("gradient") for _, counts in passes(tmp_path / "two", "protected"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, *ZERO])
def test_features_at_the_start_are_the_same_in_two_processes_as_in_one_and_computed_once(
    stage, trees, tiny_tasks, driven, in_two, tmp_path
):
    # Of 20 images, the last batch of the pass is short in each process, and so is the last step of an epoch.
    tree = trees["clip"](
        tasks=[str(tiny_tasks[0])],
        methods={"keeplora": {"preset": "balanced"}},
        training={**STEADY, "num_train_epochs": 2},
        data={"train_examples": 20},
    )
    driven(parse_config(tree | {"output_dir": str(tmp_path / "one")}))
    code, err = in_two(tree, ZERO.get(stage))
    assert code == 0, err
    apart = distances(tmp_path / "one", tmp_path / "two")
    assert apart and max(apart.values()) < 1e-5, apart
    trained = [dict(passes(tmp_path / run, "keeplora"))["TRAINED"] for run in ("one", "two")]
    assert trained == 2 * [{"forward": 20}]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero-2", "zero-3"])
def test_self_distillation_ends_under_zero_as_in_two_processes_without(
    stage, llava_tree, mixed_tasks, written, launch, script, tmp_path
):
    # The questions of its own depend on the number of processes, so one process is no reference.
    tree = llava_tree(
        tmp_path / "unset",
        methods={"self-distillation": {}},
        tasks=[str(path) for path in mixed_tasks[:2]],
        training=STEADY,
    )
    tree = halved(tree)
    for folder, zero in (("plain", None), ("zero", ZERO[stage])):
        command = [sys.executable, script, "--config", written(tree, zero), "--output-dir", tmp_path / folder]
        code, _, err = launch(command, processes=2)
        assert code == 0, err
    apart = distances(tmp_path / "plain", tmp_path / "zero", "self-distillation")
    assert len(apart) == 2 and max(apart.values()) < 1e-5, apart


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


@pytest.mark.slow
def test_the_literal_form_ends_as_in_one_process_under_zero_3(one_and_two, mixed_tasks):
    # B starts above zero: DeepSpeed's own copies of B have to start there too, and the shards' weights are W − s B₀ A.
    apart = one_and_two("zero-3", methods={"keeplora": {"form": "literal"}}, tasks=[str(mixed_tasks[0])])
    assert apart and max(apart.values()) < 1e-5, apart


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
    family, gone, stage, trees, driven, in_two, own_tasks, tmp_path
):
    # 23 or 20 examples for two processes in batches of 4: the last step has 4 and 3 of them, or 4 and none. 7 to be answered one by one.
    for image in sorted((own_tasks[0].parent / "colours/train/red").iterdir())[:gone]:
        image.unlink()
    next((own_tasks[0].parent / "colours/test/red").iterdir()).unlink()
    tree = trees[family](tasks=[str(own_tasks[0])], evaluation={"batch_size": 1})
    driven(parse_config({**tree, "output_dir": str(tmp_path / "one")}))
    code, err = in_two(tree, ZERO.get(stage))
    assert code == 0, err
    predictions = (
        (tmp_path / "two/keeplora/task-01-colours/predictions/colours.jsonl").read_text().splitlines()
    )
    assert len({json.loads(line)["id"] for line in predictions}) == len(predictions) == 7
    apart = distances(tmp_path / "one", tmp_path / "two")
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
