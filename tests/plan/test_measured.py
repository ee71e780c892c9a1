"""The memory that a plan foretells is what a run takes, stage by stage, within 20 %."""

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_keeplora.config import parse_config
from llava_keeplora.plan import make_plan
from small_vlms import SMALL_VLMS
from tiny_encoders import KINDS, write_encoders
from tiny_models import TASKS

logger = logging.getLogger(__name__)

MEASURED = ("load", "basis", "gradient", "train", "features", "evaluate")
# What is measured on a GPU is its memory, and an export's is the host's. Its libraries' work space is some 32 MB, so models are larger there.
GPU = torch.cuda.is_available()
EXPORT, WIDER = ((), 2) if GPU else (("export",), 1)
SCRIPT = Path(__file__).parents[2] / "scripts/train_seq.py"
PART = {"rank": 8, "alpha": 8, "energy_weight": 0.5, "energy_feature": 0.95}


def compare(measured, tree, small, large, more=EXPORT):
    """Ratio of the plan's figure to the measured one for every stage that a run goes through."""
    tree = {**tree, "training": {**tree["training"], "use_cpu": not GPU}}
    run = {**tree, "model": {**tree["model"], "name_or_path": str(large)}}
    found = measured({**tree, "model": {**tree["model"], "name_or_path": str(small)}}, run, *more)
    planned = {
        stage.stage: stage.device
        for stage in make_plan(parse_config(run), 1 if GPU else None).methods[0].stages
        if stage.stage in (*MEASURED, *more)
    }
    for stage, size in planned.items():
        # `pytest -m slow -o log_cli=true --log-cli-level=INFO tests/plan/test_measured.py` shows them.
        logger.info(
            "%s: planned %.0f MB, measured %.0f MB, %.2f",
            stage,
            size / 1e6,
            found[stage] / 1e6,
            size / found[stage],
        )
    return {stage: size / found[stage] for stage, size in planned.items()}


def llava(llava_tree, tasks):
    return llava_tree(
        "unset", parts={"vision": PART, "language": copy.deepcopy(PART)}, tasks=[str(task) for task in tasks]
    )


def text(width, layers):
    width *= WIDER
    return dict(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=width // 8,
    )


def vision(width, layers):
    width *= WIDER
    return dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=8
    )


def within(ratios, more=EXPORT):
    assert set(ratios) == {*MEASURED, *more}
    assert all(1 / 1.2 <= ratio <= 1.2 for ratio in ratios.values()), ratios


@pytest.mark.slow
def test_a_small_clip_takes_what_was_planned(measured, run_tree, tiny_clip, tiny_tasks, tmp_path, enlarge):
    large = enlarge(tiny_clip, tmp_path / "clip", vision(512, 4), {**vision(512, 3)}, weights=True)
    tree = run_tree(
        "unset",
        parts={"vision": PART, "text": copy.deepcopy(PART)},
        tasks=[str(tiny_tasks[0])],
        methods={"keeplora": {}},
    )
    # Its exports start processes, which takes time; those of larger models are measured.
    within(compare(measured, tree, tiny_clip, large, more=()), more=())


@pytest.mark.slow
def test_a_clip_takes_what_was_planned(measured, run_tree, tiny_clip, tiny_tasks, tmp_path, enlarge):
    large = enlarge(tiny_clip, tmp_path / "clip", vision(768, 4), vision(512, 4), weights=True)
    tree = run_tree(
        "unset",
        parts={"vision": PART, "text": copy.deepcopy(PART)},
        tasks=[str(t) for t in tiny_tasks],
        methods={"keeplora": {}},
    )
    within(compare(measured, tree, tiny_clip, large))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_another_model_of_two_encoders_takes_what_was_planned(
    measured, run_tree, tiny_tasks, tmp_path, enlarge, kind
):
    small = write_encoders(tmp_path / "small", kind, [name for names in TASKS.values() for name in names])
    # SigLIP's text features are as wide as its image features are.
    projection = {"projection_size": 768 * WIDER} if kind.startswith("siglip") else {}
    large = enlarge(small, tmp_path / "large", vision(768, 4), vision(512, 4) | projection, weights=True)
    part = PART | {"targets": None}
    tree = run_tree(
        "unset",
        parts={"vision": part, "text": copy.deepcopy(part)},
        tasks=[str(tiny_tasks[0])],
        methods={"keeplora": {}},
    )
    within(compare(measured, tree, small, large, more=()), more=())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "task-lora"}, {"method": "merge", "rule": "condu"}])
@pytest.mark.parametrize("family", ["clip", "llava"])
def test_updates_kept_apart_take_what_was_planned(
    request, measured, mixed_tasks, tiny_tasks, tmp_path, enlarge, family, options
):
    small, tree = (
        request.getfixturevalue(name)
        for name in (f"tiny_{family}", f"{'run' if family == 'clip' else family}_tree")
    )
    language, tasks = ("text", tiny_tasks) if family == "clip" else ("language", mixed_tasks)
    large = enlarge(
        small,
        tmp_path / "large",
        vision(768, 4),
        text(512, 4) if family == "llava" else vision(512, 4),
        weights=True,
    )
    tree = tree(
        "unset",
        parts={"vision": PART, language: copy.deepcopy(PART)},
        tasks=[str(task) for task in tasks[:2]],
        methods={"apart": options},
    )
    stages = ("load", "train", "features", "evaluate")
    ratios = compare(measured, tree, small, large, more=())
    assert ratios.keys() == set(stages) and all(1 / 1.2 <= ratio <= 1.2 for ratio in ratios.values()), ratios


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": {"gradient_checkpointing": True}},
        {"methods": {"keeplora": {"gradient": "dense"}}},
        {"model": {"dtype": "bfloat16"}, "training": {"bf16": True}},
        {"model": {"quantization": "nf4"}},
        {"model": {"quantization": "int8"}},
        {"memory": {"statistics_gb": 0.05}},
    ],
)
def test_a_llava_takes_what_was_planned(
    measured, llava_tree, tiny_llava, mixed_tasks, tmp_path, enlarge, changes
):
    large = enlarge(tiny_llava, tmp_path / "llava", vision(512, 4), text(768, 6), weights=True)
    tree = llava(llava_tree, mixed_tasks[:1] + mixed_tasks[2:])
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value}
    within(compare(measured, tree, tiny_llava, large))


def large_chat_model(kind):
    """Sizes of a type that writes text: its vision encoder's, its language model's, and others."""
    see, write, more = vision(512, 4), text(768, 6), {}
    width = write["hidden_size"]
    if kind.startswith("qwen"):
        see = {"depth": 4, "num_heads": 8, "out_hidden_size": width} | {
            key: see[key] for key in ("hidden_size", "intermediate_size")
        }
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [width // 48] * 3}
        write |= {"rope_parameters": rope}
    if kind == "qwen2_vl":
        see = {
            "depth": 4,
            "num_heads": 8,
            "embed_dim": see["hidden_size"],
            "hidden_size": width,
            "mlp_ratio": 4,
        }
    if kind == "pixtral":
        see |= {"head_dim": see["hidden_size"] // see["num_attention_heads"]}
    if kind == "paligemma":
        see, more = see | {"projection_dim": width}, {"projection_dim": width}
    if kind in ("qwen2_vl", "qwen2_5_vl", "gemma3", "internvl", "llava_interleave", "llava_onevision"):
        write |= {"layer_types": ["full_attention"] * write["num_hidden_layers"]}
    return see, write, more


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in SMALL_VLMS if kind != "llava"])
def test_another_model_that_writes_text_takes_what_was_planned(
    measured, llava_tree, small_vlm, mixed_tasks, tmp_path, enlarge, kind
):
    see, write, more = large_chat_model(kind)
    large = enlarge(small_vlm(kind), tmp_path / "large", see, write, weights=True, more=more)
    tree = llava(llava_tree, mixed_tasks[:1])
    tree["parts"]["vision"] = PART | {"targets": None}
    if kind == "gemma3":
        del tree["parts"]["connector"]  # a bare parameter
    within(compare(measured, tree, small_vlm(kind), large, more=()), more=())


@pytest.mark.slow
def test_sequential_lora_on_a_llava_takes_what_was_planned(
    measured, llava_tree, tiny_llava, mixed_tasks, tmp_path, enlarge
):
    large = enlarge(tiny_llava, tmp_path / "llava", vision(512, 4), text(768, 6), weights=True)
    tree = {**llava(llava_tree, mixed_tasks[:1]), "methods": {"seq-lora": {}}}
    ratios = compare(measured, tree, tiny_llava, large)
    assert set(ratios) == {"load", "train", "evaluate", "export"} and all(
        1 / 1.2 <= ratio <= 1.2 for ratio in ratios.values()
    ), ratios


@pytest.mark.slow
@pytest.mark.skipif(not GPU, reason="measures a GPU's memory")
@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 2},
        {"stage": 3},
        {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    ],
)
def test_zero_takes_what_was_planned_on_a_gpu(llava_tree, tiny_llava, mixed_tasks, tmp_path, enlarge, zero):
    large = enlarge(tiny_llava, tmp_path / "llava", vision(512, 4), text(768, 6), weights=True)
    (tmp_path / "zero.json").write_text(
        json.dumps(
            {"zero_optimization": zero, "train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": True}}
        )
    )
    tree = {**llava(llava_tree, mixed_tasks[:1]), "output_dir": str(tmp_path / "run")}
    tree["model"] = {"name_or_path": str(large), "dtype": "bfloat16"}
    tree["training"] = {
        **tree["training"],
        "use_cpu": False,
        "bf16": True,
        "deepspeed": str(tmp_path / "zero.json"),
    }
    (tmp_path / "run.json").write_text(json.dumps(tree))
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "1",
        str(SCRIPT),
        "--config",
        str(tmp_path / "run.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    planned = {stage.stage: stage.device for stage in make_plan(parse_config(tree), 1).methods[0].stages}
    entries = [
        json.loads(line) for line in (tmp_path / "run/keeplora/journal.jsonl").read_text().splitlines()
    ]
    found = {(entry["task"], entry["stage"]): entry["info"]["peak_bytes"] for entry in entries}
    stages = {
        "gradient": (1, "PREPARED"),
        "train": (1, "TRAINED"),
        "features": (1, "CONSOLIDATED"),
        "evaluate": (1, "EVALUATED"),
    }
    ratios = {}
    for stage, key in stages.items():
        # A stage of the journal starts with the model's rebuilding, which a plan calls loading.
        size = max(planned[stage], planned["load"]) if zero["stage"] < 3 else planned[stage]
        ratios[stage] = size / found[key]
        logger.info(
            "%s: planned %.0f MB, measured %.0f MB, %.2f", stage, size / 1e6, found[key] / 1e6, ratios[stage]
        )
    assert all(1 / 1.2 <= ratio <= 1.2 for ratio in ratios.values()), ratios
