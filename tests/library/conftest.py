"""Two tasks as `datasets.Dataset` objects, and the same as parquet files."""

import gc
from pathlib import Path

import datasets
import pytest
import yaml

from llava_keeplora.export import verify
from llava_keeplora.sequence import runner
from llava_keeplora_recipes import load_recipe, load_split
from shorter_runs import reload_here

FACTS = {"version": 1, "metric": "accuracy", "kind": "classification", "licence": "CC0-1.0"}


@pytest.fixture(autouse=True)
def without_report(monkeypatch):
    """Runs without drawing the report, and with libraries' objects out of the garbage collector's way."""
    monkeypatch.setattr(runner, "write_run_report", lambda root: None)
    gc.freeze()


@pytest.fixture
def quick_reload(monkeypatch):
    """Exports are loaded again in this process; tests of exports do it in a fresh one."""

    monkeypatch.setattr(verify, "verify_in_fresh_process", reload_here)


@pytest.fixture(scope="session")
def tables(tiny_tasks) -> dict[str, datasets.DatasetDict]:
    """Task → its data in memory, of three classification tasks."""

    def table(recipe, split):
        data = load_split(recipe, split)
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=recipe.classes)}
        )
        columns = {"image": [example.image for example in data], "label": data.labels}
        return datasets.Dataset.from_dict(columns, features=features)

    recipes = [load_recipe(path) for path in tiny_tasks]
    return {
        recipe.name: datasets.DatasetDict({split: table(recipe, split) for split in ("train", "test")})
        for recipe in recipes
    }


@pytest.fixture(scope="session")
def files(tables, tmp_path_factory) -> dict[str, Path]:
    """Task → a user's recipe of the same data as parquet files."""
    root, recipes = tmp_path_factory.mktemp("tables"), {}
    for name, splits in tables.items():
        for split, table in splits.items():
            (root / name).mkdir(exist_ok=True)
            table.to_parquet(str(root / name / f"{split}.parquet"))
        facts = FACTS | {
            "name": name,
            "prompt": "a photo of the {c} .",
            "classes": tables[name]["train"].features["label"].names,
            "source": {"format": "parquet", "path": name},
            "splits": {split: f"{split}.parquet" for split in splits},
        }
        recipes[name] = root / f"{name}.yaml"
        recipes[name].write_text(yaml.safe_dump(facts))
    return recipes


@pytest.fixture(scope="session")
def given(tables):
    """Function (*tasks) → `datasets` of a run: the tables, with the prompt of the files' recipes."""
    return lambda *tasks: {name: {**tables[name], "prompt": "a photo of the {c} ."} for name in tasks}
