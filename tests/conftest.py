"""Fixtures for every part: a random CLIP of a few thousand weights, three tiny tasks of a user's own, a run on them."""

from __future__ import annotations

import copy
import functools
import gc
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# Before anything imports torch or the Hub's libraries: one thread, no network, a cache of our own.
# Little of what is imported and collected is garbage, and visiting it all again and again takes a fifth of the time.
gc.disable()
CACHE = tempfile.mkdtemp(prefix="llava-keeplora-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_DATASETS_CACHE"] = os.environ["LLAVA_KEEPLORA_CACHE"] = CACHE
for flag in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[flag] = "1"
# A test's files need not survive a power cut, and a busy disk makes every one of thousands wait; forked processes do the same.
os.fsync = lambda descriptor: None

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import yaml  # noqa: E402
from PIL import Image  # noqa: E402

from tiny_models import SIDE, TASKS, write_clip, write_llava  # noqa: E402

COUNTS = {"train": 6, "test": 2}


def pytest_configure(config) -> None:
    if getattr(config.option, "numprocesses", None):
        gc.enable()
        return  # The workers run the tests; this process runs none and needs no library.
    import torch
    from transformers import PreTrainedConfig

    from llava_keeplora.bitsandbytes_import import import_bitsandbytes

    import_bitsandbytes()
    # transformers writes every configuration out for a log line that nobody reads, a twentieth of the suite's time.
    PreTrainedConfig.__repr__ = object.__repr__
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_finish(session) -> None:
    # What is there now stays: a Trainer collects garbage at its start, which is ten times quicker without it.
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config) -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """A random CLIP as a checkpoint folder; see `write_clip`."""
    classes = [name for names in TASKS.values() for name in names]
    return write_clip(tmp_path_factory.mktemp("tiny-clip"), classes)


@pytest.fixture(scope="session")
def make_llava():
    """Function (folder, kind) → checkpoint folder; see `write_llava`."""
    return write_llava


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory) -> Path:
    """A random LLaVA-1.5 as a checkpoint folder, without a chat template; see `write_llava`."""
    return write_llava(tmp_path_factory.mktemp("tiny-llava"))


@pytest.fixture(scope="session")
def dense_gradients():
    """Function (task, layers, batches, total) → layer name → G, of the layers that have one."""
    from llava_keeplora.capture import gradient_pass
    from llava_keeplora.subspace import DenseGradient

    def take(task, layers, batches, total):
        statistics = {
            name: DenseGradient(layer.out_features, layer.in_features) for name, layer in layers.items()
        }
        gradient_pass(task, layers, batches, total, statistics)
        return {
            name: statistic.matrix for name, statistic in statistics.items() if bool(statistic.matrix.any())
        }

    return take


@pytest.fixture(scope="session")
def second_moments():
    """Function (task, layers, parts, batches) → layer name → exact second moment; layers that read the same share one."""
    from llava_keeplora.capture import feature_pass
    from llava_keeplora.subspace import SecondMoment

    def take(task, layers, parts, batches):
        return feature_pass(
            task,
            layers,
            parts,
            batches,
            lambda groups: {
                name: moment
                for group in groups
                for moment in [SecondMoment(layers[group[0]].in_features)]
                for name in group
            },
        )

    return take


def draw(task: str, label: int, seed: int) -> Image.Image:
    """A noisy 16 × 16 image whose class is plain to see."""
    generator = np.random.default_rng([sorted(TASKS).index(task), label, seed])
    pixels = generator.normal(110, 25, (SIDE, SIDE, 3))
    if task == "colours":
        pixels[..., label if label < 3 else slice(None)] += 90
    elif task == "stripes":
        row, column = np.indices((SIDE, SIDE))
        across = (row, column, row + column)[label] if label < 3 else np.zeros_like(row)
        pixels += (90 * (across // 3 % 2) * (label < 3))[..., None]
    else:
        top, left = 8 * (label // 2), 8 * (label % 2)
        pixels[top : top + 8, left : left + 8] += 100
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_image_folder(root: Path, task: str) -> dict[str, Any]:
    for split, count in COUNTS.items():
        for label, name in enumerate(TASKS[task]):
            folder = root / task / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(
                    encode(draw(task, label, i if split == "train" else 100 + i))
                )
    return {"source": {"format": "imagefolder", "path": task}, "splits": {split: split for split in COUNTS}}


def write_parquet(root: Path, task: str) -> dict[str, Any]:
    import datasets

    (root / task).mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=TASKS[task])})
    for split, count in COUNTS.items():
        rows = [
            (label, i if split == "train" else 100 + i)
            for i in range(count)
            for label in range(len(TASKS[task]))
        ]
        columns = {
            "image": [{"bytes": encode(draw(task, *row)), "path": None} for row in rows],
            "label": [label for label, _ in rows],
        }
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            str(root / task / f"{split}.parquet")
        )
    return {
        "source": {"format": "parquet", "path": task},
        "splits": {split: f"{split}.parquet" for split in COUNTS},
    }


def write_tasks(root: Path) -> list[Path]:
    """The three tasks' files and a user's recipe for each; relative paths start at the recipe."""
    paths = []
    for task, write in (
        ("colours", write_image_folder),
        ("stripes", write_parquet),
        ("corners", write_image_folder),
    ):
        facts = dict(
            name=task,
            version=1,
            kind="classification",
            prompt="a photo of the {c} .",
            metric="accuracy",
            licence="CC0-1.0",
            classes=TASKS[task],
            **write(root, task),
        )
        paths.append(root / f"{task}.yaml")
        paths[-1].write_text(yaml.safe_dump(facts))
    return paths


@pytest.fixture(scope="session")
def tiny_tasks(tmp_path_factory) -> list[Path]:
    """Three recipes (ImageFolder, parquet, ImageFolder) of 24 train and 8 test images; shared, so don't change them."""
    return write_tasks(tmp_path_factory.mktemp("tiny-tasks"))


@pytest.fixture(scope="session")
def mixed_tasks(tmp_path_factory, tiny_tasks) -> list[Path]:
    """A question task (LLaVA JSON), a captioning task (COCO) and a classification task on the same kind of images."""
    root = tmp_path_factory.mktemp("mixed-tasks")
    (root / "images").mkdir()
    names, questions, captions = TASKS["colours"], {}, {}
    for split, count in COUNTS.items():
        rows = [
            (label, i if split == "train" else 100 + i) for i in range(count) for label in range(len(names))
        ]
        for label, seed in rows:
            (root / "images" / f"{label}-{seed}.png").write_bytes(encode(draw("colours", label, seed)))
        questions[split] = [
            {
                "id": f"{split}-{label}-{seed}",
                "image": f"images/{label}-{seed}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat color?"},
                    {"from": "gpt", "value": names[label]},
                ],
            }
            for label, seed in rows
        ]
        captions[split] = {
            "images": [{"id": i, "file_name": f"{label}-{seed}.png"} for i, (label, seed) in enumerate(rows)],
            "annotations": [
                {"id": 2 * i + j, "image_id": i, "caption": text.format(names[label])}
                for i, (label, _) in enumerate(rows)
                for j, text in enumerate(("a {} square.", "all {}."))
            ],
        }
        (root / f"questions-{split}.json").write_text(json.dumps(questions[split]))
        (root / f"captions-{split}.json").write_text(json.dumps(captions[split]))
    common = dict(version=1, licence="CC0-1.0")
    recipes = [
        dict(
            name="questions",
            kind="vqa",
            metric="exact_match",
            source={"format": "llava_json", "path": "."},
            **common,
        ),
        dict(
            name="captions",
            kind="captioning",
            metric="caption_rouge_l",
            prompt="Describe it.",
            source={"format": "coco_captions", "path": ".", "images": "images"},
            **common,
        ),
    ]
    paths = []
    for facts in recipes:
        facts["splits"] = {split: f"{facts['name']}-{split}.json" for split in COUNTS}
        paths.append(root / f"{facts['name']}.yaml")
        paths[-1].write_text(yaml.safe_dump(facts))
    return [*paths, tiny_tasks[2]]


@pytest.fixture
def own_tasks(tmp_path) -> list[Path]:
    """The three tasks once more, for a test that spoils them."""
    return write_tasks(tmp_path / "own-tasks")


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings are merged, but for `methods`, which is replaced; None takes a key out."""
    for key, value in changes.items():
        if value is None:
            tree.pop(key, None)
        elif isinstance(value, dict) and isinstance(tree.get(key), dict) and key != "methods":
            merge(tree[key], value)
        else:
            tree[key] = value
    return tree


@pytest.fixture(scope="session")
def shorter_runs() -> None:
    """Runs of this process that leave out what shows nothing; see `shorten_runs`."""
    from shorter_runs import shorten_runs

    shorten_runs()


@pytest.fixture(scope="session")
def run_tree(tiny_clip, tiny_tasks, shorter_runs):
    """Function (output_dir, **changes) → a run as plain data: sequential LoRA and KeepLoRA on the tiny tasks."""

    def build(output_dir: Path | str, **changes: Any) -> dict[str, Any]:
        part = {
            "targets": ["q_proj", "k_proj", "v_proj", "out_proj"],
            "rank": 2,
            "alpha": 2,
            "energy_weight": 0.5,
            "energy_feature": 0.9,
        }
        tree = {
            "output_dir": str(output_dir),
            "tasks": [str(path) for path in tiny_tasks],
            "model": {"name_or_path": str(tiny_clip)},
            "parts": {"vision": part, "text": copy.deepcopy(part)},
            "methods": {"seq-lora": {}, "keeplora": {}},
            "training": {
                "num_train_epochs": 1,
                "per_device_train_batch_size": 8,
                "learning_rate": 0.01,
                "use_cpu": True,
            },
        }
        return merge(tree, changes)

    return build


@pytest.fixture(scope="session")
def small_vlm(tmp_path_factory):
    """Function (name of `SMALL_VLMS`) → the folder of that checkpoint, written once; shared, so don't change it."""
    from small_vlms import write_small_vlm

    root = tmp_path_factory.mktemp("small-vlms")

    @functools.cache
    def write(name: str) -> Path:
        return write_small_vlm(name, root / name)

    return write


@pytest.fixture(scope="session")
def llava_tree(tiny_llava, mixed_tasks, shorter_runs):
    """Function (output_dir, **changes) → a LLaVA run as plain data: three kinds of tasks, the projector trained in full."""

    def build(output_dir: Path | str, **changes: Any) -> dict[str, Any]:
        part = {"rank": 2, "alpha": 2, "energy_weight": 0.5, "energy_feature": 0.9}
        tree = {
            "output_dir": str(output_dir),
            "tasks": [str(path) for path in mixed_tasks],
            "model": {"name_or_path": str(tiny_llava)},
            "parts": {
                "vision": part,
                "connector": {"train": "full", "learning_rate": 1e-3},
                "language": copy.deepcopy(part),
            },
            "methods": {"keeplora": {}},
            "training": {
                "num_train_epochs": 1,
                "per_device_train_batch_size": 8,
                "learning_rate": 0.01,
                "use_cpu": True,
            },
            "evaluation": {"batch_size": 8, "max_new_tokens": 6},
        }
        return merge(tree, changes)

    return build


@pytest.fixture(scope="session")
def run_config(run_tree):
    """Function (output_dir, **changes) → `RunConfig`; see `run_tree`."""
    from llava_keeplora.config import parse_config

    def build(output_dir: Path | str, **changes: Any):
        # The Trainer collects garbage after every task; without the libraries' own objects that is ten times quicker.
        gc.freeze()
        return parse_config(run_tree(output_dir, **changes))

    return build


@pytest.fixture(scope="module")
def without_reports():
    """Runs of a module's tests that end without their report: drawing it takes longer than the run."""
    from llava_keeplora.sequence import runner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_run_report", lambda root: None)
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Reports with their plots as empty pictures, for tests of what else they hold."""
    from shorter_runs import draw_nothing

    draw_nothing(monkeypatch)


@pytest.fixture(scope="session")
def driven(shorter_runs):
    """Function (config) → its folder, run without the report."""
    from llava_keeplora.sequence import runner

    def run(config) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "write_run_report", lambda root: None)
            gc.freeze()
            runner.run(config)
        return Path(config.output_dir)

    return run
