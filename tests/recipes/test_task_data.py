"""What a loaded split does: one decode, the same fingerprint everywhere, parts that don't overlap."""

import io
import pickle
from collections import Counter

import pytest
from PIL import Image

import llava_keeplora_recipes.images as images
from llava_keeplora_recipes import RecipeError, load_recipe, load_split


@pytest.fixture
def shapes():
    return load_split(load_recipe("shapes"), "train")


def test_it_is_sized_and_indexed_from_both_ends(pets):
    data = load_split(pets(), "train")
    assert len(data) == len(list(data)) == len(data.ids) == len(data.labels) == 12
    assert data[-1].id == data.ids[11] and data.split == "train" and data.dropped == []
    with pytest.raises(IndexError):
        data[12]


def test_the_fingerprint_depends_on_neither_the_place_nor_the_order_of_files(tmp_path, make):
    prints = set()
    for name, order in (("one", 1), ("two", -1)):
        make.folder(tmp_path / name, order)
        recipe = load_recipe(make.yaml(tmp_path / name / "pets.yaml", **make.facts()))
        prints |= {
            load_split(recipe, "train").fingerprint,
            load_split(recipe, "train", tmp_path / "one").fingerprint,
        }
    assert len(prints) == 1


def test_the_fingerprint_of_json_data_does_not_depend_on_the_order_of_records(tmp_path, make):
    (tmp_path / "q").mkdir()
    records = []
    for i in range(3):
        (tmp_path / "q" / f"{i}.png").write_bytes(make.encoded(i))
        records.append({"id": str(i), "image": f"{i}.png", "text": "q", "answer": "a"})
    facts = make.facts(
        kind="vqa",
        prompt=None,
        classes=None,
        source={"format": "llava_json", "path": "q"},
        splits={"train": "t.json"},
    )
    recipe = load_recipe(make.yaml(tmp_path / "q.yaml", **facts))
    make.json(tmp_path / "q" / "t.json", records)
    first = load_split(recipe, "train").fingerprint
    make.json(tmp_path / "q" / "t.json", records[::-1])
    assert load_split(recipe, "train").fingerprint == first
    make.json(tmp_path / "q" / "t.json", [records[0] | {"answer": "b"}, *records[1:]])
    assert load_split(recipe, "train").fingerprint != first


@pytest.fixture
def album(tmp_path, make):
    """A question recipe over three images, and the function to load it with these `image` entries."""
    facts = make.facts(
        kind="vqa",
        prompt=None,
        classes=None,
        source={"format": "llava_json", "path": "q"},
        splits={"train": "t.json"},
    )
    recipe = load_recipe(make.yaml(tmp_path / "q.yaml", **facts))

    def load(*shown):
        records = [
            {"id": str(i), "image": image, "text": "q", "answer": "a"} for i, image in enumerate(shown)
        ]
        make.json(tmp_path / "q" / "t.json", records)
        for i in range(3):
            (tmp_path / "q" / f"{i}.png").write_bytes(make.encoded(i))
        return load_split(recipe, "train")

    return load


def test_an_example_has_no_image_or_one_or_several_in_their_order(album, make):
    data = album(None, "2.png", ["1.png", "0.png"], [])
    pixels = [Image.open(io.BytesIO(make.encoded(i))).tobytes() for i in range(3)]
    assert [[i.tobytes() for i in e.images] for e in data] == [[], [pixels[2]], [pixels[1], pixels[0]], []]
    assert data[1].image.tobytes() == pixels[2]
    for index, count in ((0, 0), (2, 2)):
        with pytest.raises(
            RecipeError, match=f"^example '{index}' has {count} images, and one is asked for; use a task"
        ):
            data[index].image


def test_one_image_in_a_list_is_one_image(album):
    assert album("1.png").fingerprint == album(["1.png"]).fingerprint


def test_the_fingerprint_knows_number_and_order_of_images(album):
    shown = ["0.png", None, ["0.png", "1.png"], ["1.png", "0.png"], ["0.png", "0.png"]]
    assert len({album(s).fingerprint for s in shown}) == len(shown)


def test_an_image_that_many_examples_show_is_decoded_once(album, monkeypatch):
    decoded = []
    real = images.decode
    monkeypatch.setattr(images, "decode", lambda *given: decoded.append(1) or real(*given))
    data = album("0.png", ["0.png", "1.png"], "1.png")
    assert [len(e.images) for e in data] == [1, 2, 1] and len(decoded) == 2


def test_one_changed_byte_changes_the_fingerprint(pets, tmp_path):
    first = load_split(pets(), "train").fingerprint
    path = tmp_path / "pets" / "train" / "ant" / "0.png"
    path.write_bytes(path.read_bytes() + b"\0")  # after the end of the image: the pixels stay
    assert load_split(pets(), "train").fingerprint != first


def test_the_fingerprint_of_a_table_changes_with_a_byte_and_with_a_label(tmp_path, make):
    facts = make.facts(source={"format": "parquet", "path": "pets"}, splits={"train": "train.parquet"})
    recipe = load_recipe(make.yaml(tmp_path / "pets.yaml", **facts))
    prints = set()
    for last, labels in ((2, [0, 1, 2]), (3, [0, 1, 2]), (2, [0, 2, 1])):
        make.parquet(
            tmp_path / "pets" / "train.parquet",
            {"image": [make.encoded(i) for i in (0, 1, last)], "label": labels},
        )
        prints.add(load_split(recipe, "train").fingerprint)
    assert len(prints) == 3


def test_a_part_has_its_own_fingerprint_and_draws_only_its_own_images(shapes, monkeypatch):
    drawn = []
    real = images.render
    monkeypatch.setattr(images, "render", lambda *key: drawn.append(key[2]) or real(*key))
    part = shapes.take([5, 3])
    assert part.ids == [shapes.ids[5], shapes.ids[3]]
    assert part.fingerprint == shapes.take([3, 5]).fingerprint != shapes.take([3, 6]).fingerprint
    assert sorted(set(drawn)) == [3, 5, 6] and len(drawn) == 3


def test_each_image_is_decoded_once_however_often_it_is_used(pets, monkeypatch):
    decoded = []
    real = images.decode
    monkeypatch.setattr(images, "decode", lambda *given: decoded.append(1) or real(*given))
    data = load_split(pets(), "train")
    rest, holdout = data.split_holdout(0.25, seed=0)
    for part in (data, rest, holdout):
        assert part.fingerprint and all(e.image.size == (12, 12) for e in part)
    assert len(decoded) == 12


def test_images_beyond_the_memory_limit_are_decoded_again(pets, monkeypatch):
    monkeypatch.setattr(images, "KEEP_BYTES", 5 * 12 * 12 * 3)
    data = load_split(pets(), "train")
    kept = load_split(pets(), "train")
    assert [e.image.tobytes() for e in data] == [e.image.tobytes() for e in kept]
    assert len(data._images._kept) == 5


def test_it_travels_to_a_worker_process_without_its_decoded_images(pets):
    data = load_split(pets(), "train")
    copy = pickle.loads(pickle.dumps(data))
    assert not copy._images._kept
    assert copy.fingerprint == data.fingerprint and copy[3].image.tobytes() == data[3].image.tobytes()


def test_a_holdout_is_disjoint_stratified_and_complete(shapes):
    rest, holdout = shapes.split_holdout(0.2, seed=1)
    assert not set(rest.ids) & set(holdout.ids)
    assert sorted(rest.ids + holdout.ids) == sorted(shapes.ids)
    assert set(Counter(holdout.labels).values()) == {12}  # 60 per class


def test_a_holdout_follows_from_seed_and_id_alone(shapes):
    first = shapes.split_holdout(0.2, seed=1)[1]
    backwards = shapes.take(range(len(shapes) - 1, -1, -1)).split_holdout(0.2, seed=1)[1]
    assert sorted(first.ids) == sorted(backwards.ids)
    assert set(first.ids) != set(shapes.split_holdout(0.2, seed=2)[1].ids)


def test_the_choice_of_a_holdout_never_changes_between_releases(pets):
    holdout = load_split(pets(), "train").split_holdout(0.25, seed=7)[1]
    assert holdout.ids == ["train/ant/1.png", "train/big_dog/3.png", "train/cat/1.png"]


def test_a_holdout_never_empties_a_class(pets):
    data = load_split(pets(), "train")
    rest, holdout = data.split_holdout(0.99, seed=0)
    assert Counter(rest.labels) == {0: 1, 1: 1, 2: 1}
    rest, holdout = data.split_holdout(0.01, seed=0)
    assert Counter(holdout.labels) == {0: 1, 1: 1, 2: 1}


def test_an_impossible_holdout_is_refused(pets):
    data = load_split(pets(), "train")
    with pytest.raises(
        RecipeError,
        match="a holdout of 1.5 of TaskData.pets/train, 12 examples. is impossible; give a fraction between 0 and 1",
    ):
        data.split_holdout(1.5, seed=0)
    with pytest.raises(RecipeError, match="has one example per class, so nothing can be held out"):
        data.take([0, 4, 8]).split_holdout(0.5, seed=0)
