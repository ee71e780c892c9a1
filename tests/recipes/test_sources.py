"""Each format on a tiny tree: ids, labels by name, questions, answers, and RGB images."""

import datasets
import numpy as np
import pytest

from llava_keeplora_recipes import load_recipe, load_split
from llava_keeplora_recipes.rendered import RENDERED, render

NAMES = ["ant", "big_dog", "cat"]  # another order than the recipe's


@pytest.fixture
def table(tmp_path, make):
    """Write `tmp_path/pets/<file>` and load the train split of a parquet recipe with these changes."""

    def load(rows, file="train.parquet", names=None, format="parquet", columns=None, **changes):
        make.parquet(tmp_path / "pets" / file, rows, names)
        source = {"format": format, "path": "pets"} | ({"columns": columns} if columns else {})
        facts = make.facts(source=source, **({"splits": {"train": "train.parquet"}} | changes))
        return load_split(load_recipe(make.yaml(tmp_path / "pets.yaml", **facts)), "train", tmp_path)

    return load


# --------------------------------------------------------------------------------------- rendered


@pytest.mark.parametrize("task", RENDERED)
def test_a_rendered_recipe_takes_everything_from_the_code_that_draws(task):
    recipe, spec = load_recipe(task), RENDERED[task]
    data = load_split(recipe, "test")
    assert (recipe.version, recipe.classes, recipe.prompt) == (spec.version, spec.classes, spec.prompt)
    assert len(data) == spec.sizes["test"]
    for i in (0, 7, len(data) - 1):
        image, label, name = render(task, "test", i)
        example = data[i]
        assert (example.id, example.label, example.answers) == (name, label, [spec.classes[label]])
        assert example.image.tobytes() == image.tobytes()


def test_an_image_can_be_changed_by_its_reader_without_harm():
    data = load_split(load_recipe("shapes"), "test").take([0])
    before = data[0].image.tobytes()
    data[0].image.paste((0, 0, 0), (0, 0, 48, 48))
    assert data[0].image.tobytes() == before


# ------------------------------------------------------------------------------------ image folder


def test_an_image_folder_takes_labels_from_the_recipe_not_from_the_alphabet(pets, tmp_path):
    data = load_split(pets(), "train", tmp_path)
    assert data.ids[0] == "train/ant/0.png" and data.labels[0] == 2
    assert data.ids[-1] == "train/cat/3.png" and data.labels[-1] == 0
    assert data[0].answers == ["ant"] and data[0].question is None and data.recipe.classes[1] == "big_dog"


def test_each_split_folder_is_read_by_itself_whatever_its_name(pets, tmp_path):
    (tmp_path / "pets" / "train").rename(tmp_path / "pets" / "pretrain [a]")
    assert len(load_split(pets(splits={"pretrain": "pretrain [a]"}), "pretrain", tmp_path)) == 12


def test_files_that_are_no_images_are_left_out_with_a_warning(pets, tmp_path, caplog):
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").write_text("x")
    (tmp_path / "pets" / "train" / "cat" / ".hidden.png").write_text("x")
    assert len(load_split(pets(), "train", tmp_path)) == 12
    assert (
        "pets/train: 2 files are not read and left out (.txt: 1, hidden: 1; train/cat/.hidden.png, train/cat/notes.txt)"
        in caplog.text
    )


def test_class_names_map_folders_that_are_called_otherwise(pets, tmp_path):
    (tmp_path / "pets" / "train" / "cat").rename(tmp_path / "pets" / "train" / "Felis")
    data = load_split(pets(class_names={"Felis": "cat"}), "train", tmp_path)
    assert data.labels[0] == 0 and data.ids[0].startswith("train/Felis/")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(pets, tmp_path, make, mode):
    form = "TIFF" if mode == "CMYK" else "PNG"
    (tmp_path / "pets" / "train" / "cat" / "9.png").write_bytes(make.encoded(1, form, mode))
    data = load_split(pets(), "train", tmp_path)
    assert data[data.ids.index("train/cat/9.png")].image.mode == "RGB"


def test_without_a_data_root_paths_start_next_to_the_users_recipe(pets):
    assert len(load_split(pets(), "test")) == 12


# --------------------------------------------------------------------------------- parquet and Hub


def test_parquet_labels_go_by_name_where_there_are_names(table, make):
    data = table({"image": [make.encoded(i) for i in range(3)], "label": [0, 1, 2]}, names=NAMES)
    assert data.labels == [2, 1, 0] and data.ids == ["train-0", "train-1", "train-2"]


def test_parquet_labels_may_be_text_or_plain_numbers(table, make):
    images = [make.encoded(i) for i in range(3)]
    assert table({"image": images, "label": ["Big Dog", "cat", "ant"]}).labels == [1, 0, 2]
    assert table({"image": images, "label": [2, 0, 1]}).labels == [2, 0, 1]


def test_an_id_column_is_used_and_columns_can_be_renamed(table, make):
    rows = {"picture": [make.encoded(i) for i in range(3)], "id": ["x", "y", "z"]}
    data = table({"image": rows["picture"], "label": [0, 1, 2], "id": rows["id"]})
    assert data.ids == ["x", "y", "z"]
    data = table(
        {"image": rows["picture"], "label": [0, 1, 2], "key": ["p", "q", "r"]}, columns={"id": "key"}
    )
    assert data.ids == ["p", "q", "r"]


def test_several_parquet_files_are_read_in_the_order_of_their_names(tmp_path, table, make):
    make.parquet(tmp_path / "pets" / "train-1.parquet", {"image": [make.encoded(9)], "label": [2]})
    data = table(
        {"image": [make.encoded(i) for i in range(2)], "label": [0, 1]},
        "train-0.parquet",
        splits={"train": "train-*.parquet"},
    )
    assert data.labels == [0, 1, 2]


def test_a_folder_whose_name_looks_like_a_pattern_is_read(tmp_path, make):
    root = tmp_path / "a[1] *b"
    make.parquet(
        root / "pets" / "train.parquet", {"image": [make.encoded(i) for i in range(3)], "label": [0, 1, 2]}
    )
    facts = make.facts(source={"format": "parquet", "path": "pets"}, splits={"train": "train.parquet"})
    assert len(load_split(load_recipe(make.yaml(tmp_path / "pets.yaml", **facts)), "train", root)) == 3


def test_classes_come_from_the_source_where_the_recipe_leaves_them_to_it(table, make):
    rows = {"image": [make.encoded(i) for i in range(3)], "label": [0, 1, 2]}
    data = table(rows, names=NAMES, classes="from-source", num_classes=3)
    assert data.recipe.classes == NAMES and data.labels == [0, 1, 2]
    assert data.recipe.prompts[1] == "a photo of a big dog."


def test_a_hub_recipe_reads_a_local_folder_of_parquet_files(table, make):
    rows = {"image": [make.encoded(i) for i in range(3)], "label": [0, 1, 2]}
    data = table(rows, names=NAMES, format="hub", splits={"train": "train"})
    assert data.labels == [2, 1, 0] and data[0].image.mode == "RGB"


def test_a_hub_recipe_asks_for_its_id_config_revision_and_split(tmp_path, make, monkeypatch):
    asked = {}

    def fake(path, name=None, *, revision, cache_dir):
        asked.update(path=path, name=name, revision=revision)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
        rows = {"image": [{"bytes": make.encoded(i), "path": None} for i in range(3)], "label": [0, 1, 2]}
        return make.builder(datasets.Dataset.from_dict(rows, features=features), asked)

    monkeypatch.setattr(datasets, "load_dataset_builder", fake)
    source = {"format": "hub", "path": "someone/pets", "config": "small", "revision": "abc"}
    recipe = load_recipe(
        make.yaml(tmp_path / "pets.yaml", **make.facts(source=source, splits={"train": "train[:50%]"}))
    )
    assert load_split(recipe, "train", tmp_path).labels == [2, 1, 0]
    assert asked == {"path": "someone/pets", "name": "small", "split": "train[:50%]", "revision": "abc"}


def test_a_table_of_questions_yields_answers(tmp_path, make):
    make.parquet(
        tmp_path / "q" / "test.parquet",
        {"image": [make.encoded(0)], "question": ["What is it?"], "answers": ["a cat"]},
    )
    facts = make.facts(
        kind="vqa",
        prompt="{q}\nAnswer with one word.",
        classes=None,
        source={"format": "parquet", "path": "q"},
        splits={"test": "test.parquet"},
    )
    example = load_split(load_recipe(make.yaml(tmp_path / "q.yaml", **facts)), "test")[0]
    assert (example.question, example.answers, example.label) == (
        "What is it?\nAnswer with one word.",
        ["a cat"],
        None,
    )


# ------------------------------------------------------------------------------- LLaVA and COCO


def test_llava_records_yield_question_and_answer_without_the_image_token(tmp_path, make):
    folder = tmp_path / "q"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(make.encoded(0))
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat"}]
    make.json(folder / "train.json", [{"id": 1, "image": "images/a.png", "conversations": turns}])
    make.json(
        folder / "test.json",
        [{"question_id": "t1", "image": "images/a.png", "text": "What is it?", "answer": "a cat"}],
    )
    facts = make.facts(
        kind="vqa",
        prompt=None,
        classes=None,
        source={"format": "llava_json", "path": "q"},
        splits={"train": "train.json", "test": "test.json"},
    )
    recipe = load_recipe(make.yaml(tmp_path / "q.yaml", **facts))
    for split, name in (("train", "1"), ("test", "t1")):
        example = load_split(recipe, split, tmp_path)[0]
        assert (example.id, example.question, example.answers) == (name, "What is it?", ["a cat"])
        assert np.asarray(example.image).shape == (12, 12, 3) and example.label is None


def test_coco_captions_are_joined_by_image(tmp_path, make):
    folder = tmp_path / "c"
    (folder / "images").mkdir(parents=True)
    for name in "ab":
        (folder / "images" / f"{name}.png").write_bytes(make.encoded(ord(name)))
    make.json(folder / "train.json", {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}],
        "annotations": [
            {"id": 1, "image_id": 3, "caption": "two"}, {"id": 2, "image_id": 7, "caption": "one"}, {"id": 3, "image_id": 7, "caption": "uno"},
        ],
    })  # fmt: skip
    facts = make.facts(
        kind="captioning",
        prompt="Describe it.",
        classes=None,
        metric="cider",
        source={"format": "coco_captions", "path": "c"},
        splits={"train": "train.json"},
    )
    data = load_split(load_recipe(make.yaml(tmp_path / "c.yaml", **facts)), "train")
    assert [(e.id, e.question, e.answers) for e in data] == [
        ("7", "Describe it.", ["one", "uno"]),
        ("3", "Describe it.", ["two"]),
    ]
