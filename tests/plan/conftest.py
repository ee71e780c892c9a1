"""Models large enough that their tensors dominate, with weights or without; plans of runs on them."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

MEASURE = Path(__file__).with_name("measure.py")


@pytest.fixture(scope="session")
def enlarge():
    """Function (from, to, vision, text, weights, more) → a checkpoint folder with other sizes, random weights or only a configuration."""

    def make(
        source: Path, folder: Path, vision: dict, text: dict, weights: bool = False, more: dict | None = None
    ) -> Path:
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

        from llava_keeplora_eval.encoders import ENCODERS

        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        config = AutoConfig.from_pretrained(source)
        for part, values in (
            (config.vision_config, vision),
            (config.text_config, text),
            (config, more or {}),
        ):
            for key, value in values.items():
                setattr(part, key, value)
        config.save_pretrained(folder)
        if weights:
            torch.manual_seed(0)
            auto = AutoModel if config.model_type in ENCODERS else AutoModelForImageTextToText
            auto.from_config(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def wide_llava(tmp_path_factory, tiny_llava, enlarge) -> Path:
    """A LLaVA of width 512 without weights."""
    text = dict(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    return enlarge(
        tiny_llava,
        tmp_path_factory.mktemp("wide-llava"),
        dict(hidden_size=256, intermediate_size=1024, num_attention_heads=4),
        text,
    )


@pytest.fixture(scope="session")
def wide_tree(llava_tree, wide_llava, mixed_tasks):
    """Function (**changes) → a run of KeepLoRA on the wide LLaVA as plain data, one task of questions."""

    def build(**changes):
        part = {"rank": 4, "alpha": 4, "energy_weight": 0.5, "energy_feature": 0.9}
        model = {"name_or_path": str(wide_llava)} | changes.pop("model", {})
        tree = {
            "model": model,
            "tasks": [str(mixed_tasks[0])],
            "parts": {"vision": part, "language": copy.deepcopy(part)},
        }
        return llava_tree("unset", **tree | changes)

    return build


@pytest.fixture(scope="session")
def peaks():
    """Function (tree, gpus) → stage → device bytes of KeepLoRA, planned for GPUs with memory to spare."""
    from llava_keeplora.config import parse_config
    from llava_keeplora.plan import make_plan

    planned: dict[str, dict[str, int]] = {}

    def of(tree, gpus: int = 1) -> dict[str, int]:
        key = json.dumps([tree, gpus], sort_keys=True)
        if key not in planned:
            plan = make_plan(parse_config(tree), gpus, 1000.0)
            planned[key] = {stage.stage: stage.device for stage in plan.methods[0].stages}
        return dict(planned[key])

    return of


@pytest.fixture
def measured(tmp_path):
    """Function (tiny run, run, what else) as plain data → stage → measured bytes, in a process of its own; see `measure.py`."""

    def run(warm_up: dict, tree: dict, *more: str) -> dict[str, int]:
        paths = []
        for name, one in (("warm-up", warm_up), ("run", tree)):
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps({**one, "output_dir": str(tmp_path / name)}))
        # Freed memory goes back to the system at once, so that what is resident is what is in use.
        environment = {
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
        }
        # What oneDNN compiles for bf16 is no part of a plan.
        environment |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1", "LRU_CACHE_CAPACITY": "1"}
        done = subprocess.run(
            [sys.executable, str(MEASURE), *map(str, paths), *more],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def seven_b(tmp_path_factory) -> Path:
    """The configuration of LLaVA-1.5-7B, nothing else."""
    import transformers

    vision = dict(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = dict(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=11008,
        vocab_size=32064,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**text),
        image_token_id=32000,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("llava-1.5-7b")
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def seven_b_tree(tmp_path_factory, seven_b):
    """Function (batch, quantization, **training) → UCIT's settings on two tasks whose data are absent, as plain data."""
    root, tasks = tmp_path_factory.mktemp("absent"), []
    for name, train, test in (("first", 20_000, 2_000), ("second", 8_001, 1_000)):
        facts = dict(
            name=name,
            version=1,
            kind="vqa",
            metric="exact_match",
            licence="CC0-1.0",
            source={"format": "llava_json", "path": "gone"},
            splits={"train": "train.json", "test": "test.json"},
            expected_sizes={"train": train, "test": test},
        )
        tasks.append(root / f"{name}.yaml")
        tasks[-1].write_text(yaml.safe_dump(facts))

    def build(batch: int, quantization: str | None = None, **training):
        return {
            "output_dir": "unset",
            "tasks": [str(path) for path in tasks],
            "model": {"name_or_path": str(seven_b), "dtype": "bfloat16", "quantization": quantization},
            "parts": {
                "language": {"rank": 32, "alpha": 8, "energy_weight": 0.6},
                "connector": {"train": "full", "learning_rate": 2e-5},
            },
            "methods": {"keeplora": {"gradient_fraction": 0.2}},
            "training": {
                "num_train_epochs": 1,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": 64 // batch,
                "bf16": True,
                **training,
            },
            "evaluation": {"batch_size": 8},
        }

    return build
