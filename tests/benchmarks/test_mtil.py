"""MTIL's sets from the trees in which they are published."""

import json
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from llava_keeplora_recipes import RecipeError, load_recipe, load_sequence, load_split

TASKS = load_sequence("mtil-order1").tasks
CUT = ("mtil/caltech101", "mtil/eurosat", "mtil/sun397")


def said(data) -> list[tuple[str, int]]:
    """What a split says of its images: (class, grey)."""
    return [(example.answers[0], round(np.asarray(example.image).mean())) for example in data]


@pytest.mark.parametrize("task", [t for t in TASKS if t not in CUT])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_set_with_an_official_split_is_read_from_its_published_tree(mtil, mtil_recipes, task, split):
    data = load_split(load_recipe(mtil_recipes[task]), split, mtil.root)
    assert Counter(said(data)) == Counter(mtil.said[task, split])
    assert data[0].image.size == {"mtil/cifar100": (32, 32), "mtil/mnist": (28, 28)}.get(task, (16, 16))


@pytest.mark.parametrize("task", CUT)
def test_a_set_without_one_is_cut_as_pytorch_cuts_it(mtil, mtil_recipes, task):
    everything = mtil.said[task, "all"]
    size = int(0.8 * len(everything))
    parts = torch.utils.data.random_split(
        everything, [size, len(everything) - size], torch.Generator().manual_seed(42)
    )
    recipe = load_recipe(mtil_recipes[task])
    for split, part in zip(("train", "test"), parts, strict=True):
        assert Counter(said(load_split(recipe, split, mtil.root))) == Counter(part)


def test_labels_of_numbers_become_the_names_that_the_data_have(mtil, mtil_recipes):
    cars = load_split(load_recipe(mtil_recipes["mtil/stanfordcars"]), "train", mtil.root)
    assert cars.recipe.classes == [f"Maker Model {i} 2012" for i in range(3)] and cars.labels == [0, 1, 2] * 2
    assert cars.recipe.prompts[1] == "a photo of the Maker Model 1 2012, a type of car."


def test_the_images_of_caltechs_background_are_no_class(mtil, mtil_recipes):
    recipe = load_recipe(mtil_recipes["mtil/caltech101"])
    ids = [*load_split(recipe, "train", mtil.root).ids, *load_split(recipe, "test", mtil.root).ids]
    assert len(ids) == len(mtil.said["mtil/caltech101", "all"]) and not any("BACKGROUND" in i for i in ids)


def test_the_reference_images_are_read_from_folders_that_name_their_classes(mtil, imagenet):
    data = load_split(load_recipe(imagenet), "train", mtil.root)
    assert data.recipe.classes == ["n01440764", "n01443537"] and data.labels == [0, 0, 1, 1]
    assert [example.id for example in data] == [
        f"train/{name}/{name}_{grey}.JPEG" for name in data.recipe.classes for grey in (200, 40)
    ]
    with pytest.raises(
        RecipeError, match="mtil/imagenet/train has 2 classes and recipe 'mtil/imagenet' expects 1000"
    ):
        load_split(load_recipe("mtil/imagenet"), "train", mtil.root)


@pytest.mark.parametrize("task", TASKS)
def test_a_set_is_the_same_wherever_it_lies(mtil, mtil_recipes, task, tmp_path):
    """An id, and so the data's fingerprint, comes from the set alone."""
    (tmp_path / "elsewhere").symlink_to(mtil.root)
    recipe = load_recipe(mtil_recipes[task])
    one, two = load_split(recipe, "test", mtil.root), load_split(recipe, "test", tmp_path / "elsewhere")
    assert (
        one.ids == two.ids
        and one.fingerprint == two.fingerprint
        and not any(str(mtil.root) in i for i in one.ids)
    )


def test_a_shipped_recipe_without_its_data_says_what_is_missing(tmp_path):
    for task in TASKS:
        with pytest.raises(
            RecipeError,
            match=f"the data of '{task}' is not there: no folder '{tmp_path}/{load_recipe(task).source['path']}'",
        ):
            load_split(load_recipe(task), "test", tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_a_set_is_read_from_the_hub_where_a_user_names_an_id(tmp_path, monkeypatch, task):
    recipe = load_recipe(task)
    names = (recipe.classes or [f"class {i}" for i in range(recipe.num_classes)])[
        ::-1
    ]  # their order is the Hub set's own
    rows = {
        "image": [Image.new("RGB", (4, 4), (i % 256, 0, 0)) for i in range(len(names))],
        "label": list(range(len(names))),
    }
    table = datasets.Dataset.from_dict(
        rows,
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}),
    )
    builder = SimpleNamespace(
        config=SimpleNamespace(data_files={"train": ["hf://train.parquet"]}),
        info=SimpleNamespace(builder_name="parquet"),
        download_and_prepare=lambda: None,
        as_dataset=lambda split: {"train": table}[split],
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, *a, **k: {"you/set": builder}[path])
    facts = {
        "extends": task,
        "source": {"format": "hub", "path": "you/set"},
        "splits": {"train": "train", "test": "test"},
        "expected_sizes": {},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(facts))
    data = load_split(load_recipe(tmp_path / "mine.yaml"), "train")
    assert [answers[0] for answers in data.answers] == names and data.recipe.prompt == recipe.prompt
