"""Entries of COCO's and TextVQA's files that are malformed or that nothing uses."""

from pathlib import Path

import pytest

from llava_keeplora_recipes import RecipeError, load_recipe, load_split
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


def test_entries_of_textvqa_that_are_incomplete_or_unused_are_counted(caplog):
    notes = [
        {"question_id": 1, "answers": ["a"]},
        {"question_id": 2},
        {"question_id": 9, "answers": ["b"]},
        3,
    ]
    assert _by_question(notes, Path("val.json"), [{"question_id": 1}], None) == {0: ["a"]}
    assert "of 4 entries, 2 have no" in caplog.text and "1 are for questions" in caplog.text
