"""Datasets by their id on the Hub and folders in its layout: text files as written, and no file passed over."""

import json
import shutil
import zipfile
from pathlib import Path

import datasets
import pytest

from llava_keeplora_recipes import RecipeError, inspect_split, load_recipe, load_split, tables

WRITTEN = ["007", "True", "NA", "null", "1.50"]
CSV = "file_name,question,answers\n" + "".join(f"{i}.png,what?,{a}\n" for i, a in enumerate(WRITTEN))


@pytest.fixture
def folder(tmp_path, make):
    """Write files beside the images `0.png` to `4.png` of a split `train`; return the dataset's folder."""

    def write(files, place="set"):
        train = tmp_path / place / "train"
        train.mkdir(parents=True)
        for i in range(5):
            (train / f"{i}.png").write_bytes(make.encoded(i))
        for name, text in files.items():
            (train / name).write_text(text)
        return tmp_path / place

    return write


@pytest.fixture
def recipe(tmp_path, make):
    """A recipe of questions on a dataset in the Hub's layout."""

    def write(path="set", **changes):
        facts = dict(kind="vqa", prompt="{q}", metric="exact_match", classes=None, splits={"train": "train"})
        facts = make.facts(source={"format": "hub", "path": path}, **(facts | changes))
        return load_recipe(make.yaml(tmp_path / "set.yaml", **facts))

    return write


def lines(*answers, **changes):
    rows = [{"file_name": f"{i}.png", "question": "what?", "answers": a} for i, a in enumerate(answers)]
    rows[-1] |= changes
    return "\n".join(map(json.dumps, rows))


@pytest.fixture
def on_the_hub(folder, tmp_path, monkeypatch):
    """Serve a folder in the cache of the Hub's files as the dataset `someone/pets`."""

    def serve(files):
        place = folder(files, "hub/datasets--someone--pets/snapshots/pets")
        monkeypatch.setattr(tables, "HF_HUB_CACHE", str(tmp_path / "hub"))
        load = datasets.load_dataset_builder
        with monkeypatch.context() as patched:
            patched.setattr(
                datasets,
                "load_dataset_builder",
                lambda path, *rest, **given: load(str(place), *rest, **given),
            )
            yield
        shutil.rmtree(place)

    return serve


def test_csv_of_a_dataset_on_the_hub_is_the_text_that_is_written_with_and_without_a_network(
    on_the_hub, recipe, monkeypatch, tmp_path
):
    pets = recipe("someone/pets")
    for _ in on_the_hub({"metadata.csv": CSV, "x.heic": ""}):
        data = load_split(pets, "train", tmp_path)
    assert [answers for [answers] in data.answers] == WRITTEN
    # the cache has the name of the folder that stood for the dataset
    cached = Path(datasets.config.HF_DATASETS_CACHE, "csv-as-written", "pets")
    cached.rename(cached.with_name("someone___pets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    again = tables.load_hub_dataset("someone/pets", None, "train", None, "label")
    assert again.table["answers"][:] == WRITTEN and again.names_files


def test_a_cache_of_what_pandas_made_of_csv_is_refused_without_a_network(recipe, monkeypatch, tmp_path):
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets/train.csv").write_text(CSV)
    datasets.load_dataset(str(tmp_path / "pets"))
    cached = Path(datasets.config.HF_DATASETS_CACHE, "pets")
    cached.rename(cached.with_name("someone___pets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="only as pandas reads CSV.*once with a network"):
        load_split(recipe("someone/pets"), "train", tmp_path)


def test_values_of_json_are_what_is_written(folder, recipe, tmp_path):
    answers = ["2020-01-01", "red", 3, 10**30, True]
    folder({"metadata.jsonl": lines(*answers)})
    assert load_split(recipe(), "train", tmp_path).answers == [
        ["2020-01-01"], ["red"], ["3"], ["1" + 30 * "0"], ["yes"],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_a_json_table_holds_what_is_written(tmp_path, make, recipe, name):
    rows = [{"image": "0.png", "question": "what?", "answers": a} for a in ("2020-01-01", 3, "red")]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/0.png").write_bytes(make.encoded(0))
    text = json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows))
    (tmp_path / "set" / name).write_text(text, "utf-16")
    assert load_split(recipe(), "train", tmp_path).answers == [["2020-01-01"], ["3"], ["red"]]


def test_files_that_the_metadata_does_not_list_are_counted(folder, recipe, tmp_path):
    folder({"metadata.jsonl": lines("a", "b"), "x.heic": "", ".hidden": ""})
    data, problems = inspect_split(recipe(splits={"train": "train[:50%]"}), "train", tmp_path)
    assert not problems and len(data) == 1
    assert data.left_out == {
        "not in the metadata": [f"train/{i}.png" for i in (2, 3, 4)],
        ".heic": ["train/x.heic"],
        "hidden": ["train/.hidden"],
    }


def test_images_of_the_hub_that_the_metadata_does_not_list_are_counted(on_the_hub, recipe, tmp_path):
    for _ in on_the_hub({"metadata.csv": CSV.rsplit("3.png")[0]}):
        data = load_split(recipe("someone/pets"), "train", tmp_path)
    assert data.left_out == {"not in the metadata": ["train/3.png", "train/4.png"]}


@pytest.mark.parametrize("name", [None, "", " "])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_row_without_a_file_name_is_refused_by_record(folder, recipe, tmp_path, form, name):
    csv = f"file_name,question,answers\n0.png,what?,a\n{name or ''},what?,b\n"
    folder({f"metadata.{form}": csv if form == "csv" else lines("a", "b", file_name=name)})
    data, problems = inspect_split(recipe(), "train", tmp_path)
    assert data.ids == ["train-0"] and "'train-1' in pets/train has no 'file_name'" in str(*problems)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "metadata.jsonl has no rows"),
        ("[1]", "row 1 of .* is no object"),
        ('{"file_name": "0.png", "a": 1, "a": 2}', "line 1 .* key 'a' more than once"),
        ('{"file_name": "0.png", "a": NaN}', "line 1 .* holds NaN"),
        (lines("a", ["b"]), "'answers' in .* have several kinds"),
        (lines("a", "b", file_name="../1.png"), "row 2 of .* has '../1.png' as its 'file_name'"),
        (lines("a", "b", file_name="http://x/1.png"), "row 2 of .* has 'http"),
        (lines("a", file_name=3), "row 1 of .* has 3 as its 'file_name'"),
        (lines("a", image="1.png"), "'file_name', whose images are called 'image', and a column 'image'"),
        ('{"image": "0.png"}', "no column 'file_name' .it has 'image'."),
    ],
)
def test_a_malformed_metadata_jsonl_is_refused(folder, recipe, tmp_path, text, match):
    folder({"metadata.jsonl": text})
    with pytest.raises(RecipeError, match=match):
        load_split(recipe(), "train", tmp_path)


def test_settings_of_a_card_that_change_cells_are_read_or_refused(tmp_path, make, recipe):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/0.png").write_bytes(make.encoded(0))
    (tmp_path / "set/train.csv").write_text("0.png;what?;007\n")
    card = "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  sep: ';'\n{}\n---\n"
    (tmp_path / "set/README.md").write_text(card.format("  names: [image, question, answers]"))
    assert load_split(recipe(), "train", tmp_path).answers == [["007"]]
    (tmp_path / "set/README.md").write_text(card.format("  decimal: ','"))
    with pytest.raises(RecipeError, match="sets 'decimal'"):
        load_split(recipe(), "train", tmp_path)


def test_a_list_of_splits_is_refused(folder, recipe, tmp_path):
    folder({"metadata.csv": CSV})
    with pytest.raises(RecipeError, match="splits by name"):
        load_split(recipe(splits={"train": ["train", "train"]}), "train", tmp_path)


def test_an_empty_file_name_in_a_list_of_them_is_refused_by_record(folder, recipe, tmp_path):
    rows = [
        {"file_names": names, "question": "what?", "answers": "a"}
        for names in (["0.png", "1.png"], ["", "2.png"])
    ]
    folder({"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    data, problems = inspect_split(recipe(), "train", tmp_path)
    assert data.image_counts == [2] and "'train-1' in pets/train has an empty place" in str(*problems)


def test_a_cell_of_a_csv_file_may_be_long(folder, recipe, tmp_path):
    folder({"metadata.csv": f"file_name,question,answers\n0.png,what?,{'a' * 200_000}\n"})
    assert load_split(recipe(), "train", tmp_path).answers == [["a" * 200_000]]


def test_several_metadata_files_are_read_in_the_order_of_their_names_with_the_same_columns(
    folder, recipe, tmp_path, make
):
    place = folder({})
    for name in "hgfedcba":
        (place / "train" / name).mkdir()
        (place / "train" / name / "0.png").write_bytes(make.encoded(ord(name)))
        (place / "train" / name / "metadata.csv").write_text(
            f"file_name,question,answers\n0.png,what?,{name}\n"
        )
    assert load_split(recipe(), "train", tmp_path).answers == [[name] for name in "abcdefgh"]
    (place / "train/b/metadata.csv").write_text("file_name,answers\n0.png,b\n")
    with pytest.raises(RecipeError, match="metadata.csv has other columns than .*metadata.csv"):
        load_split(recipe(), "train", tmp_path)


def test_a_value_that_is_text_in_another_json_file_becomes_text_by_the_rule(tmp_path, make, recipe):
    (tmp_path / "set/data").mkdir(parents=True)
    (tmp_path / "set/0.png").write_bytes(make.encoded(0))
    for shard, answer in enumerate(["red", False, 3.0]):
        row = {"image": "0.png", "question": "what?", "answers": answer}
        (tmp_path / f"set/data/train-{shard}.jsonl").write_text(json.dumps(row))
    assert load_split(recipe(), "train", tmp_path).answers == [["red"], ["no"], ["3"]]


def test_images_in_an_archive_are_refused_with_the_cure(tmp_path, make, recipe):
    (tmp_path / "set").mkdir()
    with zipfile.ZipFile(tmp_path / "set/train.zip", "w") as archive:
        archive.writestr("0.png", make.encoded(0))
        archive.writestr("metadata.csv", "file_name,question,answers\n0.png,what?,007\n")
    with pytest.raises(RecipeError, match="'train-0' .* in an archive .*; unpack the archive"):
        load_split(recipe(), "train", tmp_path)
