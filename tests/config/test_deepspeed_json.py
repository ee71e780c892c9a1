"""A ZeRO JSON that contradicts the YAML is refused with both values."""

import json

import pytest

from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.plan.sharding import read_sharding

BATCH = {"train_micro_batch_size_per_gpu": "auto"}


@pytest.fixture
def with_json(run_tree, tmp_path):
    """Function (JSON content, **changes of the YAML) → a run as plain data."""

    def build(content, **changes):
        (tmp_path / "zero.json").write_text(json.dumps(BATCH | content))
        tree = run_tree(tmp_path / "run", **changes)
        tree["training"]["deepspeed"] = str(tmp_path / "zero.json")
        return tree

    return build


@pytest.mark.parametrize(
    ("content", "changes", "both"),
    [
        ({"bf16": {"enabled": True}}, {}, ("bf16.enabled true", "model.dtype is float32")),
        (
            {"bf16": {"enabled": "auto"}},
            {"training": {"bf16": True}},
            ("bf16.enabled true", "model.dtype is float32"),
        ),
        ({}, {"model": {"dtype": "bfloat16"}}, ("bf16.enabled false", "model.dtype is bfloat16")),
        ({"fp16": {"enabled": True}}, {}, ("fp16.enabled true", "model.dtype is float32")),
        (
            {"zero_optimization": {"stage": 3}},
            {"model": {"quantization": "nf4"}},
            ("zero_optimization.stage 3", "model.quantization nf4"),
        ),
        (
            {"zero_optimization": {"stage": "x"}},
            {},
            ("zero_optimization.stage", "got 'x'", "set it to 0, 1, 2 or 3"),
        ),
        (
            {"zero_optimization": {"stage": 4}},
            {},
            ("zero_optimization.stage", "got 4", "set it to 0, 1, 2 or 3"),
        ),
    ],
)
def test_a_precision_or_form_that_contradicts_the_model_is_refused_with_both_values(
    content, changes, both, with_json
):
    with pytest.raises(ConfigError) as refused:
        parse_config(with_json(content, **changes))
    assert all(value in str(refused.value) for value in both)


@pytest.mark.parametrize(
    ("zero", "sentence"),
    [
        ({"reduce_bucket_size": "big"}, "zero_optimization.reduce_bucket_size 'big'"),
        ({"offload_optimizer": "cpu"}, "offload_optimizer is 'cpu'"),
    ],
)
def test_a_value_that_the_plan_cannot_read_is_refused_with_its_key(zero, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_sharding({"zero_optimization": {"stage": 2, **zero}}, 2, 8)


def test_methods_with_different_zero_configurations_are_refused_with_both(run_tree, tmp_path):
    methods = {"seq-lora": {}, "keeplora": {"training": {"deepspeed": {"zero_optimization": {"stage": 2}}}}}
    with pytest.raises(
        ConfigError,
        match="must be the same for all methods.*None for 'seq-lora' and .*'stage': 2.* for 'keeplora'",
    ):
        parse_config(run_tree(tmp_path / "run", methods=methods))


CONTRADICTIONS = {
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 100, "warmup_num_steps": 7, "warmup_max_lr": "auto"},
    },
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.5}},
}
PAIRS = {
    "scheduler.params.total_num_steps=100": "steps of 'colours'=3",
    "scheduler.params.warmup_num_steps=7": "warmup_steps of 'colours'=1",
    "train_micro_batch_size_per_gpu=3": "per_device_train_batch_size=8",
    "gradient_accumulation_steps=4": "gradient_accumulation_steps=1",
    "optimizer.params.lr=0.5": "learning_rate=0.01",
}


def test_batches_and_rates_that_contradict_the_training_section_are_refused_before_anything_is_learned(
    with_json, launch_here, tmp_path
):
    code, error = launch_here(with_json({"zero_optimization": {"stage": 2}} | CONTRADICTIONS))
    assert code == 2 and "the DeepSpeed configuration contradicts the run's" in error
    assert all(f"{theirs} against training.{ours}" in error for theirs, ours in PAIRS.items()), error
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.fixture
def launch_here(tmp_path):
    """Function (run as plain data) → (exit code, stderr) of the command line: DeepSpeed needs a process of its own."""
    import sys

    import yaml

    import forked

    def start(tree):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
        command = [
            sys.executable,
            "-m",
            "llava_keeplora.cli",
            "train",
            "--config",
            str(tmp_path / "run.yaml"),
        ]
        code, _, error = forked.run(command)
        return code, error

    return start
