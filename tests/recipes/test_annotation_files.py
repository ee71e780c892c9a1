"""Entries of COCO's and TextVQA's files that are malformed or that nothing uses."""

import re
from pathlib import Path

import pytest

from llava_keeplora_recipes import RecipeError, inspect_split, load_recipe, load_split
from llava_keeplora_recipes.coco import captions_by_image
from llava_keeplora_recipes.references import _by_question


@pytest.mark.parametrize("name", ["", "  ", None, 7])
def test_an_image_of_coco_without_a_file_name_is_named(tmp_path, make, name):
    content = {"images": [{"id": 5, "file_name": name}], "annotations": [{"image_id": 5, "caption": "a"}]}
    make.json(tmp_path / "set" / "train.json", content)
    source = {"format": "coco_captions", "path": "set", "images": ""}
    facts = dict(kind="captioning", prompt="Describe.", metric="cider", classes=None, source=source)
    recipe = load_recipe(
        make.yaml(tmp_path / "set.yaml", **make.facts(**facts, splits={"train": "train.json"}))
    )
    with pytest.raises(RecipeError, match="image 5 of train.json .*'file_name'") as caught:
        load_split(recipe, "train", tmp_path)
    assert "NoneType" not in str(caught.value)


@pytest.fixture
def captions(tmp_path, make):
    """Check a file of captions with the images 1 and 2 and another entry."""

    def check(image=None, note=None):
        (tmp_path / "set").mkdir()
        for i in (1, 2):
            (tmp_path / "set" / f"{i}.png").write_bytes(make.encoded(i))
        images = [{"id": i, "file_name": f"{i}.png"} for i in (1, 2)]
        notes = [{"id": 10 * i, "image_id": i, "caption": f"caption {i}"} for i in (1, 2)]
        content = {
            "images": images + [image] * (image is not None),
            "annotations": notes + [note] * (note is not None),
        }
        make.json(tmp_path / "set" / "train.json", content)
        source = {"format": "coco_captions", "path": "set", "images": ""}
        facts = dict(kind="captioning", prompt="Say.", metric="caption_cider", classes=None, source=source)
        yaml = make.yaml(tmp_path / "set.yaml", **make.facts(**facts, splits={"train": "train.json"}))
        return inspect_split(load_recipe(yaml), "train", tmp_path)

    return check


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"file_name": "1.png"}, "entry 2 of 'images' in train.json has no 'id'"),
        ({"id": True}, "entry 2 of 'images' in train.json has the boolean True as its id"),
        ({"id": [3]}, "entry 2 of 'images' .* has the list \\[3\\] as its id"),
        ({"id": ""}, "entry 2 of 'images' .* has the text '' as its id"),
        ({"id": 1, "file_name": "1.png"}, "image 1 of train.json is listed twice"),
        ({"id": "1", "file_name": "1.png"}, "image 1 of train.json is listed twice"),
        (7, "entry 2 of 'images' in train.json is the number 7"),
    ],
)
def test_a_malformed_image_of_coco_is_named_by_file_and_entry(captions, entry, match):
    data, problems = captions(image=entry)
    assert data.answers == [["caption 1"], ["caption 2"]] and re.search(match, str(*problems))


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"caption": "a"}, "entry 2 of 'annotations' in train.json has no 'image_id'"),
        ({"image_id": {"a": 1}, "caption": "a"}, "'image_id' of entry 2 .* has the object .* as its id"),
        ({"image_id": 3, "caption": "a"}, "entry 2 .* is for the image 3, which is not listed"),
        ({"image_id": 1}, "entry 2 .* has no 'caption'"),
        ({"image_id": 1, "caption": ["a"]}, "entry 2 .* has the list .* as its caption"),
        ({"image_id": 1, "caption": {"text": "a"}}, "entry 2 .* has the object .* as its caption"),
        (
            {"id": 10, "image_id": 1, "caption": "caption 1"},
            "entry 2 .* a second annotation 10 of the image 1",
        ),
        ("a caption", "entry 2 of 'annotations' in train.json is the text 'a caption'"),
    ],
)
def test_a_malformed_annotation_of_coco_is_named_by_file_and_entry(captions, entry, match):
    data, problems = captions(note=entry)
    assert data.answers == [["caption 1"], ["caption 2"]] and re.search(match, str(*problems))


def test_ids_of_coco_are_the_same_as_text_and_as_numbers(captions):
    data, problems = captions(note={"image_id": "2", "caption": 7})
    assert not problems and data.answers == [["caption 1"], ["caption 2", "7"]]


def test_an_image_of_which_the_only_annotation_is_refused_is_not_said_to_have_none(captions, make):
    problems: list = []
    content = {"images": [{"id": 1}, {"id": 2}], "annotations": [{"image_id": 1, "caption": []}]}
    assert captions_by_image(content, Path("train.json"), problems) == {}
    assert [
        "as its caption" in str(problems[0]),
        "1 images of train.json have no caption (first: 2)" in str(problems[1]),
    ] == [True] * len(problems)


def test_entries_of_textvqa_that_are_incomplete_or_unused_are_counted(caplog):
    notes = [
        {"question_id": 1, "answers": ["a"]},
        {"question_id": 2},
        {"question_id": 9, "answers": ["b"]},
        3,
    ]
    assert _by_question(notes, Path("val.json"), [{"question_id": 1}], None) == {0: ["a"]}
    assert "of 4 entries, 2 have no" in caplog.text and "1 are for questions" in caplog.text
