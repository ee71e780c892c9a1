"""A recipe file: what it may say, and how it refuses what it doesn't understand."""

import pytest

from llava_keeplora_recipes import RecipeError, load_recipe


@pytest.fixture
def refusal(tmp_path, make):
    """The sentence with which a recipe with these changes is refused."""

    def read(**changes) -> str:
        path = make.yaml(tmp_path / "mine.yaml", **make.facts(**changes))
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        return str(caught.value)

    return read


def test_a_prompt_is_made_per_class_with_underscores_as_spaces(pets):
    assert pets().prompts == ["a photo of a cat.", "a photo of a big dog.", "a photo of a ant."]


def test_a_classification_task_asks_its_instruction_or_the_usual_question(pets):
    assert pets(instruction="Which pet?").vlm_prompt == "Which pet?"
    assert (
        pets().vlm_prompt == "What is shown in the image?\nAnswer the question using a single word or phrase."
    )


def test_other_braces_in_a_prompt_or_a_class_are_left_alone(pets):
    assert pets(prompt="{x} {c}", classes=["{c}", "b"]).prompts == ["{x} {c}", "{x} b"]


def test_an_unknown_name_is_answered_with_the_nearest_one():
    with pytest.raises(
        RecipeError,
        match=r"^there is no recipe 'caltech'; did you mean 'caltech101', or give the path of a .yaml file\.$",
    ):
        load_recipe("caltech")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        RecipeError, match="there is no recipe file '.*none.yaml'; give the path of an existing YAML file"
    ):
        load_recipe(tmp_path / "none.yaml")


def test_a_misspelt_key_is_answered_with_the_file_and_the_nearest_key(refusal):
    assert refusal(promt="x") == "mine.yaml has the unknown key 'promt'; did you mean 'prompt'."


@pytest.mark.parametrize(
    "key", ["name", "version", "kind", "metric", "licence", "source", "splits", "prompt", "classes"]
)
def test_a_missing_key_is_named(refusal, key):
    assert refusal(**{key: None}).startswith(f"mine.yaml lacks the key '{key}'; add '{key}:' to ")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"classes": ["cat", "cat"]}, "mine.yaml lists the class 'cat' twice; remove one of them."),
        ({"classes": ["cat", False]}, "mine.yaml has the class False, which YAML does not read as text; put quotes around it."),
        ({"classes": ["cat"]}, "mine.yaml has no list of at least two classes; list them under 'classes', or write 'classes: from-source'."),
        ({"num_classes": 4}, "mine.yaml lists 3 classes but says num_classes: 4; correct one of them."),
        (
            {"prompt": "a photo."},
            "mine.yaml has the prompt 'a photo.', which has no place for the class; "
            "write {c} where the class name goes, as in 'a photo of a {c}.'.",
        ),
        ({"kind": "classificaton"}, "mine.yaml has the kind 'classificaton'; did you mean 'classification'."),
        ({"source": {"format": "parket", "path": "x"}}, "mine.yaml has the source format 'parket'; did you mean 'parquet'."),
        (
            {"source": {"format": "imagefolder", "pth": "x"}},
            "mine.yaml has the unknown key 'source.pth' for format imagefolder; did you mean 'path'.",
        ),
        (
            {"source": {"format": "parquet", "path": "x", "columns": {"lable": "y"}}},
            "mine.yaml has the unknown key 'source.columns.lable'; did you mean 'label'.",
        ),
        (
            {"source": {"format": "coco_captions", "path": "x"}},
            "mine.yaml is of the kind classification, which the format coco_captions does not hold; use captioning, or another format.",
        ),
        ({"class_names": {"Kitty": "cet"}}, "mine.yaml maps the label 'Kitty' to 'cet', which is not one of its classes; did you mean 'cat'."),
        ({"splits": {"train": 3}}, "mine.yaml has 3 as its split 'train'; write the file, folder or split name as text."),
        ({"instruction": " "}, "mine.yaml has an empty 'instruction'; write the question, or leave 'instruction' out."),
        (
            {"kind": "vqa", "prompt": None, "classes": None, "instruction": "x", "source": {"format": "llava_json", "path": "x"}},
            "mine.yaml has 'instruction', which a vqa recipe does not use; remove it from ",
        ),
        ({"name": "../up"}, "mine.yaml has the name '../up', which cannot be a folder; use letters, digits, '.', '_', '-', and '/' between parts."),
        (
            {"kind": "vqa", "prompt": None, "source": {"format": "llava_json", "path": "x"}},
            "mine.yaml has 'classes', which a vqa recipe does not use; remove it from ",
        ),
        (
            {"kind": "vqa", "prompt": "Answer.", "classes": None, "source": {"format": "llava_json", "path": "x"}},
            "mine.yaml has the prompt 'Answer.', which has no place for the question; ",
        ),
        (
            {"source": {"format": "rendered", "task": "digits"}},
            "mine.yaml lists classes for a rendered task, which has its own; remove 'classes' from ",
        ),
        (
            {"source": {"format": "rendered", "task": "digits"}, "classes": None, "splits": {"train": "trian"}},
            "mine.yaml names the split 'trian', which 'digits' does not have; did you mean 'train'.",
        ),
        ({"source": {"format": "rendered", "task": "digit"}}, "mine.yaml names the rendered task 'digit', which does not exist; did you mean 'digits'."),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_its_cure(refusal, changes, sentence):
    assert refusal(**changes).startswith(sentence)


def test_a_value_of_the_wrong_type_is_refused(refusal):
    assert refusal(version="one").startswith(
        "mine.yaml has 'one' under 'version', which is not a whole number; "
    )
    assert refusal(version=True).startswith(
        "mine.yaml has True under 'version', which is not a whole number; "
    )


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(
        RecipeError, match="mine.yaml is not valid YAML .*the key 'name' occurs twice.*; correct the file"
    ):
        load_recipe(path)


def test_a_file_without_keys_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("just text")
    with pytest.raises(RecipeError, match="holds no 'key: value' pairs"):
        load_recipe(path)


def test_a_recipe_can_extend_a_shipped_one_and_replace_its_source(tmp_path, make):
    path = make.yaml(
        tmp_path / "mine.yaml", extends="mtil/dtd", source={"format": "parquet", "path": "textures"}
    )
    mine, shipped = load_recipe(path), load_recipe("mtil/dtd")
    assert mine.source == {"format": "parquet", "path": "textures"}
    assert (mine.name, mine.prompts, mine.folder) == (shipped.name, shipped.prompts, tmp_path)


def test_a_recipe_that_extends_itself_is_refused(tmp_path, make):
    path = make.yaml(tmp_path / "mine.yaml", extends="mine.yaml")
    with pytest.raises(RecipeError, match="mine.yaml extends itself; remove 'extends' from"):
        load_recipe(path)


def test_the_fingerprint_follows_what_a_model_sees_and_nothing_else(pets):
    first = pets().fingerprint
    assert pets(citation="someone", seen_by=["a-model"]).fingerprint == first
    assert pets(source={"format": "imagefolder", "path": "elsewhere"}).fingerprint == first
    assert pets(prompt="a picture of a {c}.").fingerprint != first
    assert pets(classes=["cat", "ant", "big_dog"]).fingerprint != first
    assert pets(version=2).fingerprint != first
    assert pets(instruction="Which pet?").fingerprint != first


def test_a_recipe_of_the_first_release_keeps_its_fingerprint():
    """Prediction files of earlier runs name it."""
    assert (
        load_recipe("trashnet").fingerprint
        == "d6b3562cc4405a9fa398ef7a9dbf28b6013b696c739327d8028ebda6c3d6664e"
    )


def test_a_question_recipe_has_no_question_of_its_own(pets):
    recipe = pets(kind="vqa", prompt=None, classes=None, source={"format": "llava_json", "path": "x"})
    with pytest.raises(
        RecipeError, match="^recipe 'pets' is vqa, where every example has its own question; read 'question'"
    ):
        recipe.vlm_prompt
