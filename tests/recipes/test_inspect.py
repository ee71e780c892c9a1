"""Inspecting a split tells everything that is wrong with it, and what can be used."""

import pytest

from llava_keeplora_recipes import inspect_split, load_recipe, load_split


@pytest.fixture
def questions(tmp_path, make):
    def build(*records, **source):
        make.json(tmp_path / "q" / "train.json", list(records))
        for i in range(2):
            (tmp_path / "q" / f"{i}.png").write_bytes(make.encoded(i))
        source = {"format": "llava_json", "path": "q"} | source
        facts = make.facts(
            kind="vqa", prompt=None, classes=None, source=source, splits={"train": "train.json"}
        )
        return load_recipe(make.yaml(tmp_path / "q.yaml", **facts))

    return build


def record(name, image="0.png", **changes) -> dict:
    return {"id": name, "image": image, "text": "q", "answer": "a"} | changes


def test_a_sound_split_has_no_problems_and_is_the_loaded_one(questions):
    recipe = questions(record("a"), record("b", "1.png"))
    data, problems = inspect_split(recipe, "train")
    assert problems == [] and data.fingerprint == load_split(recipe, "train").fingerprint


def test_every_record_and_every_image_that_is_wrong_is_reported(questions, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "broken.png").write_bytes(b"no image")
    recipe = questions(
        record("a"),
        record("b", answer=[]),
        3,
        record("c", "none.png"),
        record("d", ["0.png", "broken.png"]),
        record("e", "../0.png"),
        record("a", text="<image><image>q"),
        record("a", "1.png"),
    )
    data, problems = inspect_split(recipe, "train")
    told = [str(p) for p in problems]
    assert data.ids == ["a", "a"] and data.dropped == ["c", "d"]
    of_records = [t.split(";")[0] for t in told if t.startswith("record")]
    assert of_records == [
        "record 'b' of train.json has no answer",
        "record 2 of train.json is not a JSON object",
        "record 'e' of train.json has the path '../0.png', which leads out of its data folder",
        "record 'a' of train.json marks 2 images in its question and names 1",
    ]
    assert (
        f"an image of 'c' in pets/train cannot be read (no such file '{tmp_path}/q/none.png'); replace it, or correct its path."
        in told
    )
    assert any(
        t.startswith("an image of 'd' in pets/train cannot be read (cannot identify image file") for t in told
    )
    assert any(t.startswith("pets/train has 1 ids more than once (a)") for t in told)
    assert len(told) == 7


def test_labels_and_folders_are_reported_one_by_one(pets, tmp_path, make):
    (tmp_path / "pets" / "train" / "x.png").write_bytes(make.encoded(0))
    data, problems = inspect_split(pets(classes=["cat", "ant"]), "train")
    told = [str(p) for p in problems]
    assert len(data) == 8 and len(told) == 5
    assert sum("has the label 'big_dog', which is none of the 2 classes" in t for t in told) == 4
    assert sum("'train/x.png' of 'pets' lies in no class folder" in t for t in told) == 1


def test_a_file_that_is_missing_leaves_nothing(questions, tmp_path):
    recipe = questions()
    (tmp_path / "q" / "train.json").unlink()
    data, problems = inspect_split(recipe, "train")
    assert data is None and ["the train split of 'pets' is not there" in str(p) for p in problems] == [True]


def test_a_rendered_task_can_be_inspected_too():
    data, problems = inspect_split(load_recipe("shapes"), "test")
    assert len(data) == 300 and not problems
    assert (
        str(inspect_split(load_recipe("shapes"), "tset")[1][0])
        == "recipe 'shapes' has no split 'tset'; did you mean 'test'."
    )
