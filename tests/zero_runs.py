"""DeepSpeed's settings that tests share, and how far apart two runs of any number of processes are."""

import json

import torch
from safetensors.torch import load_file

#: What DeepSpeed takes from the training arguments.
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


def halved(tree):
    tree["training"]["per_device_train_batch_size"] //= 2
    return tree


def first_tasks(tree, count):
    return tree | {"tasks": tree["tasks"][:count]}


def distances(one, two, label="keeplora", worst=1e-4, names=("delta", "state")):
    """Relative distances of two runs, (task, delta or state) → ‖x − y‖ / ‖x‖ over all layers: of ΔW, and of the projectors onto the bases as
    they are after the task, of which a state has the columns that it added.

    No single layer may be further away than `worst`. There a layer counts as no smaller than a thousandth of the largest one: what has no
    effect, as k's bias in an attention, learns nothing but rounding.
    """
    found, grown = {}, ({}, {})
    for folder in sorted(p.name for p in (one / label).glob("task-*")):
        for name in names:
            paths = [run / label / folder / f"{name}.safetensors" for run in (one, two)]
            assert paths[0].exists() == paths[1].exists(), (folder, name)
            if paths[0].exists():
                a, b = (matrices(name, load_file(path)) for path in paths)
                assert {key: x.shape for key, x in a.items()} == {key: x.shape for key, x in b.items()}
                if name == "state":
                    for basis, new in zip(grown, (a, b)):
                        basis.update({key: basis.get(key, 0) + x for key, x in new.items()})
                    a, b = grown
                if not a:
                    continue  # A bound may train nothing with a task.
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
