"""Labels of MATLAB files: which class each image gets, counted from one there and from zero here."""

import numpy as np
import pytest
from scipy.io import savemat

from llava_keeplora_recipes import RecipeError, inspect_split, load_recipe, load_split

NAMES = ["AM General Hummer", "Acura RL", "Acura TL"]


@pytest.fixture
def flowers(tmp_path, make):
    """Five flowers, of which a split has some, with their labels by number of the image."""

    def load(labels=(3, 1, 2, 2, 1), numbers=(4, 1, 2, 3), kind=np.uint8, check=load_split):
        folder = tmp_path / "flowers"
        (folder / "jpg").mkdir(parents=True)
        for i in range(1, 6):
            (folder / "jpg" / f"image_{i:05d}.jpg").write_bytes(make.encoded(i, "JPEG"))
        savemat(folder / "imagelabels.mat", {"labels": np.array([labels], kind)})
        savemat(folder / "setid.mat", {"trnid": np.array([numbers], kind), "valid": [[5]]})
        facts = make.facts(
            source={"format": "flowers_mat", "path": "flowers"}, splits={"train": "trnid", "test": "valid"}
        )
        return check(load_recipe(make.yaml(tmp_path / "flowers.yaml", **facts)), "train", tmp_path)

    return load


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float64])
def test_a_flowers_label_is_that_of_its_number_and_counts_from_one(flowers, kind):
    data = flowers(kind=kind)
    assert dict(zip(data.ids, data.labels, strict=True)) == {
        "image_00004.jpg": 1,  # the fourth label is 2, the second class
        "image_00001.jpg": 2,
        "image_00002.jpg": 0,
        "image_00003.jpg": 1,
    }
    assert [answer for [answer] in data.answers] == ["big_dog", "ant", "cat", "big_dog"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"labels": (3, 0, 2, 2, 1)}, "imagelabels.mat has the class 0, and classes count from 1"),
        ({"labels": (3, 1.5, 2, 2, 1), "kind": np.float64}, "imagelabels.mat has the class 1.5"),
        ({"labels": (3, np.nan, 2, 2, 1), "kind": np.float64}, "imagelabels.mat has the class nan"),
        ({"labels": (3, 4, 2, 2, 1)}, "label 3, which is none of the 3 classes"),
        ({"numbers": (4, 1, 6, 3)}, "setid.mat names the image 6, and imagelabels.mat has labels of 5"),
        ({"numbers": (4, 1, 0, 3)}, "setid.mat names the image 0"),
        ({"numbers": (4, 1, 1, 3)}, "1 ids more than once .image_00001.jpg."),
    ],
)
def test_a_flower_without_its_label_is_refused(flowers, changes, match):
    with pytest.raises(RecipeError, match=match):
        flowers(**changes)


@pytest.fixture
def cars(tmp_path, make):
    """Three cars with annotations of some classes, by the names of the devkit."""

    def load(classes=(3, 1, 2), names=NAMES, check=load_split, order="from-source"):
        folder = tmp_path / "cars"
        (folder / "devkit").mkdir(parents=True)
        notes = []
        for i, label in enumerate(classes):
            (folder / f"{i}.jpg").write_bytes(make.encoded(i, "JPEG"))
            notes.append((f"{i}.jpg", label))
        savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array([names], object)})
        fields = [("fname", object), ("class", object)]
        savemat(folder / "train.mat", {"annotations": np.array([notes], fields)})
        source = {"format": "cars_mat", "path": "cars"}
        facts = make.facts(classes=order, source=source, splits={"train": "train.mat"})
        return check(load_recipe(make.yaml(tmp_path / "cars.yaml", **facts)), "train", tmp_path)

    return load


def test_a_car_has_the_name_at_its_number_counted_from_one(cars):
    data = cars()
    assert dict(zip(data.ids, [answer for [answer] in data.answers], strict=True)) == {
        "0.jpg": "Acura TL",
        "1.jpg": "AM General Hummer",
        "2.jpg": "Acura RL",
    }
    assert data.recipe.classes == NAMES and data.labels == [2, 0, 1]


def test_a_car_gets_its_class_by_name_where_the_recipe_lists_them_in_another_order(cars):
    data = cars(order=NAMES[::-1])
    assert data.labels == [0, 2, 1] and data.answers == [["Acura TL"], ["AM General Hummer"], ["Acura RL"]]


def test_one_car_of_one_class_is_read_as_a_list_of_one(cars):
    data, problems = cars(classes=(2,), check=inspect_split)
    assert data.answers == [["Acura RL"]] and "2 of 3 classes have no example" in str(*problems)


@pytest.mark.parametrize(
    ("classes", "match"),
    [
        ((3, 1, 0), "annotation 3 of train.mat has the class 0"),
        ((3, 1, "2"), "annotation 3 of train.mat has the class '2'"),
        ((3, 1, 4), "label 3"),
    ],
)
def test_a_car_of_no_class_is_refused(cars, classes, match):
    with pytest.raises(RecipeError, match=match):
        cars(classes=classes)


def test_a_class_of_cars_without_a_name_is_refused(cars):
    with pytest.raises(RecipeError, match="as the name of class 2"):
        cars(names=["AM General Hummer", np.zeros(0), "Acura TL"])
