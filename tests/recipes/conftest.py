"""Tiny trees on disk in every format, and recipes that read them."""

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from llava_keeplora_recipes import load_recipe


def encoded(seed: int, form: str = "PNG", mode: str = "RGB", side: int = 12) -> bytes:
    """A small encoded image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


def write_yaml(path: Path, **facts) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(facts))
    return path


def recipe_facts(**changes) -> dict:
    """A valid recipe for an image folder of three classes, with changes."""
    facts = dict(
        name="pets",
        version=1,
        kind="classification",
        prompt="a photo of a {c}.",
        metric="accuracy",
        licence="MIT",
        classes=["cat", "big_dog", "ant"],
        source={"format": "imagefolder", "path": "pets"},
        splits={"train": "train", "test": "test"},
    )
    return {k: v for k, v in (facts | changes).items() if v is not None}


def write_folder(root: Path, order: int = 1, count: int = 4) -> Path:
    """`root/pets/<split>/<class>/<n>.png`, created in the order given (1 or -1)."""
    files = [
        (root / "pets" / split / name / f"{i}.png", encoded(hash_of(split, name, i)))
        for split in ("train", "test")
        for name in ("ant", "big_dog", "cat")
        for i in range(count)
    ]
    for path, data in files[::order]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def hash_of(*words) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate("|".join(map(str, words)))) % 2**32


def write_parquet(
    path: Path, rows: dict, names: list[str] | None = None, columns: dict | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"image": datasets.Image()}
    if "label" in rows:
        kind = (
            datasets.ClassLabel(names=names)
            if names
            else datasets.Value("string" if isinstance(rows["label"][0], str) else "int64")
        )
        features["label"] = kind
    features |= {k: datasets.Value("string") for k in rows if k not in features}
    rows = rows | {"image": [{"bytes": b, "path": None} for b in rows["image"]]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(path))
    return path


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def prepared(table: datasets.Dataset, asked: dict | None = None) -> SimpleNamespace:
    """A builder of a table that is on the Hub; `asked` gets the split that is asked for."""

    def as_dataset(split):
        (asked if asked is not None else {}).update(split=split)
        return table

    return SimpleNamespace(
        config=SimpleNamespace(data_files={"train": ["hf://train.parquet"]}),
        info=SimpleNamespace(builder_name="parquet"),
        download_and_prepare=lambda: None,
        as_dataset=as_dataset,
    )


@pytest.fixture
def make() -> SimpleNamespace:
    """What the tests build their trees with."""
    return SimpleNamespace(
        encoded=encoded,
        yaml=write_yaml,
        facts=recipe_facts,
        folder=write_folder,
        parquet=write_parquet,
        json=write_json,
        builder=prepared,
    )


@pytest.fixture
def pets(tmp_path, make):
    """A recipe for an image folder under `tmp_path`, and the function to write changed ones."""
    make.folder(tmp_path)

    def changed(**changes):
        return load_recipe(make.yaml(tmp_path / "pets.yaml", **make.facts(**changes)))

    return changed


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The tests' tables stay out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def real_data() -> Path:
    """The folder of the small real sets, where there is one."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    root = Path(os.environ.get("LLAVA_KEEPLORA_DATA", beside))
    if not (root / "trashnet").is_dir():
        pytest.skip("set LLAVA_KEEPLORA_DATA to the folder of the real sets")
    return root
