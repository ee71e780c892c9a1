"""Models large enough that their tensors dominate, with weights or without; plans of runs on them."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
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


class Peaks(Mapping):
    """Stage → device bytes of an estimate, each rehearsed when it is asked for."""

    def __init__(self, estimate):
        self.estimate = estimate

    def __getitem__(self, stage: str) -> int:
        return self.estimate.peak(stage).device

    def __iter__(self):
        return iter(self.estimate.stages)

    def __len__(self) -> int:
        return len(self.estimate.stages)


@pytest.fixture(scope="session")
def peaks():
    """Function (tree, gpus) → `Peaks` of its first method, for GPUs with memory to spare."""
    from llava_keeplora.config import parse_config
    from llava_keeplora.plan.machine import find_machine
    from llava_keeplora.plan.plan import _Scenarios

    def of(tree, gpus: int = 1) -> Peaks:
        estimates = _Scenarios(parse_config(tree), find_machine(gpus, 1000.0)).at({})
        return Peaks(next(iter(estimates.values())))

    return of


@pytest.fixture(scope="session")
def remembered():
    """(configuration, GPUs) → its estimates; see `estimated_once`."""
    return {}


@pytest.fixture
def estimated_once(remembered, monkeypatch):
    """Rehearse equal configurations once: what a stage takes does not depend on how much memory there is."""
    from llava_keeplora.plan.plan import _Scenarios

    estimate = _Scenarios._estimate

    def once(self, config, gpus):
        key = repr((config, gpus))
        if key not in remembered:
            remembered[key] = (estimate(self, config, gpus), self.work)
        estimates, self.work = remembered[key]
        return estimates

    monkeypatch.setattr(_Scenarios, "_estimate", once)


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
