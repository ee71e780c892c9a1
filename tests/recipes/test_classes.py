"""A task has one list of classes, which a model and a metric can tell apart."""

import pytest

from llava_keeplora_recipes import RecipeError, inspect_split, load_recipe, load_split


@pytest.fixture
def folders(tmp_path, make):
    """A recipe `classes: from-source` over folders of images with these names."""

    def build(**splits):
        for split, names in splits.items():
            for i, name in enumerate(names):
                path = tmp_path / "pets" / split / name / "0.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(make.encoded(len(split) + i))
        facts = make.facts(classes="from-source", splits={split: split for split in splits})
        return load_recipe(make.yaml(tmp_path / "pets.yaml", **facts))

    return build


def test_the_classes_of_every_split_are_those_of_the_training_data(folders):
    recipe = folders(test=["ant", "cat"], train=["ant", "bee", "cat"])
    train, test = load_split(recipe, "train"), load_split(recipe, "test")
    assert test.recipe == train.recipe and test.recipe.classes == ["ant", "bee", "cat"]
    assert test.labels == [0, 2] and train.recipe.fingerprint == test.recipe.fingerprint


def test_a_class_without_training_data_is_refused_by_name(folders):
    recipe = folders(train=["ant", "bee"], test=["ant", "yak"])
    assert len(load_split(recipe, "train")) == 2
    with pytest.raises(RecipeError, match="label 'yak', which is none of the 2 classes.*add training data"):
        load_split(recipe, "test")
    assert len(inspect_split(recipe, "test")[1]) == 1


def test_without_training_data_the_classes_are_those_of_the_first_split(folders):
    assert load_split(folders(test=["ant", "yak"]), "test").recipe.classes == ["ant", "yak"]


def test_integers_of_another_order_are_found_by_their_names(tmp_path, make):
    for split, names in (("train", ["ant", "cat"]), ("test", ["cat", "ant"])):
        rows = {"image": [make.encoded(i) for i in range(2)], "label": [0, 1]}
        make.parquet(tmp_path / "pets" / f"{split}.parquet", rows, names)
    source = {
        "source": {"format": "parquet", "path": "pets"},
        "splits": {s: f"{s}.parquet" for s in ("train", "test")},
    }
    recipe = load_recipe(make.yaml(tmp_path / "pets.yaml", **make.facts(classes="from-source", **source)))
    assert (load_split(recipe, "train").labels, load_split(recipe, "test").labels) == ([0, 1], [1, 0])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ice_cream", "ice cream"),
        ("Ant", "ant"),
        ("a  b", "a b"),
        ("cat", "cat "),
        ("caf\u00e9", "cafe\u0301"),
    ],
)
def test_two_classes_that_become_one_are_refused_with_both_names(tmp_path, make, folders, one, other):
    with pytest.raises(RecipeError) as caught:
        load_recipe(make.yaml(tmp_path / "pets.yaml", **make.facts(classes=["dog", one, other])))
    assert repr(one) in str(caught.value) and repr(other) in str(caught.value)
    if one != "caf\u00e9":
        with pytest.raises(RecipeError, match="one and the same in prompts"):
            load_split(folders(train=[one, other]), "train")


@pytest.mark.parametrize("name", ["", " ", "_"])
def test_a_class_without_a_name_is_refused(tmp_path, make, name):
    with pytest.raises(RecipeError, match="which is no name"):
        load_recipe(make.yaml(tmp_path / "pets.yaml", **make.facts(classes=["dog", name])))


@pytest.fixture
def numbers(tmp_path, make):
    """The data of a table with these labels, and classes that are numbers as text."""

    def read(labels, classes=("1", "10", "2", "3"), **changes):
        make.parquet(
            tmp_path / "pets" / "train.parquet",
            {"image": [make.encoded(i) for i in range(len(labels))], "label": labels},
        )
        source = {"source": {"format": "parquet", "path": "pets"}, "splits": {"test": "train.parquet"}}
        return load_split(
            load_recipe(
                make.yaml(tmp_path / "pets.yaml", **make.facts(classes=list(classes), **source, **changes))
            ),
            "test",
        )

    return read


def test_a_number_that_could_be_a_position_or_a_name_is_reported(numbers, caplog):
    assert numbers([1, 2]).labels == [1, 2]
    assert (
        "the label 1 is read as the position of the class '10'" in caplog.text
        and "not as the name '1' (1 such" in caplog.text
    )


def test_no_doubt_is_reported_where_there_is_none(numbers, caplog):
    assert numbers(["1", "2"]).labels == [0, 2]
    assert numbers([0, 1, 2], classes=("0", "1", "2")).labels == [0, 1, 2]
    assert numbers([1], class_names={"1": "1"}).labels == [0]
    assert numbers([0, 1], classes=("ant", "bee")).labels == [0, 1]
    assert "position" not in caplog.text
