"""Where a text marks its images, by one rule in every format."""

import pytest

from llava_keeplora_recipes import RecipeError, load_recipe
from llava_keeplora_recipes.placeholders import place_images


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("What?", 0, "What?"),
        (" What? ", 2, " What? "),
        ("<image>\nWhat?", 1, "What?"),
        ("<image> <image>\n What?", 2, "What?"),
        ("What?\n<image>", 1, "What?"),
        ("<image>", 1, ""),
        ("Is <image> left?", 1, "Is <image> left?"),
        ("Is <image> left of <image>?", 2, "Is <image> left of <image>?"),
        ("<image> or <image>?", 2, "<image> or <image>?"),
        ("What?<image><image>", 2, "What?<image><image>"),
    ],
)
def test_places_inside_of_a_text_are_kept(text, images, expected):
    assert place_images(text, images, "r") == expected
    assert place_images(expected, images, "r") == expected


@pytest.mark.parametrize(("text", "images"), [("<image> q", 0), ("<image> q", 2), ("<image><image> q", 1)])
def test_another_number_of_markers_than_images_is_refused(text, images):
    with pytest.raises(
        RecipeError, match=f"r marks {text.count('<image>')} images? in its question and names {images}"
    ):
        place_images(text, images, "r")


def test_classification_marks_its_image_in_the_instruction_and_nowhere_else(make, tmp_path):
    def recipe(**changes):
        return load_recipe(make.yaml(tmp_path / "q.yaml", **make.facts(**changes)))

    assert recipe(instruction="<image>\nWhich?").vlm_prompt == "Which?"
    assert recipe(instruction="In <image>, which?").vlm_prompt == "In <image>, which?"
    for changes, reason in (
        ({"instruction": "<image> or <image>?"}, "the instruction of q.yaml marks 2 images"),
        ({"prompt": "<image> of a {c}"}, "marks an image in its prompt"),
        ({"classes": ["a", "<image>"]}, "class '<image>', which is no name"),
    ):
        with pytest.raises(RecipeError, match=reason):
            recipe(**changes)
