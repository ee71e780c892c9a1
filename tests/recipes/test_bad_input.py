"""Every kind of bad data is refused with one sentence that says what, where, and the cure."""

import re
import threading

import pytest

from llava_keeplora_recipes import RecipeError, images, load_recipe, load_split


def refusal(recipe, split="train", root=None, **options) -> str:
    with pytest.raises(RecipeError) as caught:
        load_split(recipe, split, root, **options)
    return str(caught.value)


@pytest.fixture
def questions(tmp_path, make):
    """A question recipe over `train.json` with these records."""

    def build(*records):
        make.json(tmp_path / "q" / "train.json", list(records))
        facts = make.facts(
            kind="vqa",
            prompt=None,
            classes=None,
            source={"format": "llava_json", "path": "q"},
            splits={"train": "train.json"},
        )
        return load_recipe(make.yaml(tmp_path / "q.yaml", **facts))

    return build


@pytest.fixture
def captions(tmp_path, make):
    def build(images, annotations):
        make.json(tmp_path / "c" / "train.json", {"images": images, "annotations": annotations})
        facts = make.facts(
            kind="captioning",
            prompt="Describe it.",
            classes=None,
            source={"format": "coco_captions", "path": "c"},
            splits={"train": "train.json"},
        )
        return load_recipe(make.yaml(tmp_path / "c.yaml", **facts))

    return build


# ----------------------------------------------------------------------------- nothing to read


def test_no_data_root():
    assert refusal(load_recipe("trashnet")) == (
        "recipe 'trashnet' reads files from 'trashnet' under a data root, and none is given; "
        "give the folder that holds it with --data-root."
    )


def test_a_data_root_that_does_not_hold_the_task(tmp_path):
    assert refusal(load_recipe("trashnet"), root=tmp_path) == (
        f"the data of 'trashnet' is not there: no folder '{tmp_path / 'trashnet'}'; give the folder that holds it with --data-root."
    )


def test_a_split_that_the_recipe_does_not_have(pets):
    assert refusal(pets(), "tran") == "recipe 'pets' has no split 'tran'; did you mean 'train'."


def test_a_split_whose_files_are_missing(pets, tmp_path):
    missing = tmp_path / "pets" / "val"
    assert refusal(pets(splits={"val": "val"}), "val") == (
        f"the val split of 'pets' is not there: no '{missing}'; add the file, or correct 'splits' in the recipe."
    )
    recipe = pets(source={"format": "parquet", "path": "pets"}, splits={"train": "train-*.parquet"})
    assert "the train split of 'pets' is not there: no '" in refusal(recipe)


def test_a_source_that_the_user_must_name(tmp_path, make):
    recipe = load_recipe(
        make.yaml(tmp_path / "mine.yaml", extends="mtil/sun397", source={"format": "hub", "path": None})
    )
    assert refusal(recipe).startswith(
        "recipe 'mtil/sun397' does not say where its data is (source.path is None); write a YAML with 'extends: mtil/sun397' and a 'source:'"
    )


def test_a_hub_dataset_that_cannot_be_reached(pets, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no  network\nhere")

    monkeypatch.setattr("datasets.load_dataset_builder", fail)
    assert refusal(pets(source={"format": "hub", "path": "someone/else"})) == (
        "Hub dataset 'someone/else' of recipe 'pets' cannot be loaded with the split 'train' (ConnectionError: no network here); "
        "check the id, the split's name and the network, or use parquet files with 'format: parquet'."
    )


def test_an_empty_split(pets, tmp_path):
    (tmp_path / "pets" / "none").mkdir()
    assert (
        refusal(pets(splits={"train": "none"}))
        == "pets/train holds no examples; add files, or correct 'splits' in the recipe."
    )


def test_a_file_that_is_not_parquet(pets, tmp_path):
    (tmp_path / "pets" / "train.parquet").write_text("not parquet")
    sentence = refusal(pets(source={"format": "parquet", "path": "pets"}, splits={"train": "train.parquet"}))
    assert sentence.startswith("the train split of 'pets' cannot be read as parquet (") and sentence.endswith(
        "; replace train.parquet."
    )


def test_a_path_that_leads_out_of_the_data_folder(pets, questions):
    assert refusal(pets(splits={"train": "../other"})) == (
        "split 'train' of recipe 'pets' has the path '../other', which leads out of its data folder; use a path inside the folder."
    )
    record = {"id": "a", "image": "/etc/passwd", "text": "q", "answer": "a"}
    assert refusal(questions(record)).startswith(
        "record 'a' of train.json has the path '/etc/passwd', which leads out of its data folder"
    )
    assert "leads out of its data folder" in refusal(questions(record | {"image": "images/../../x.png"}))


# ----------------------------------------------------------------------------------- images


def break_images(tmp_path) -> None:
    folder = tmp_path / "pets" / "train" / "cat"
    (folder / "0.png").write_bytes(b"no image at all")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:150])


def test_unreadable_and_truncated_images_are_counted_and_named_in_one_pass(pets, tmp_path):
    break_images(tmp_path)
    sentence = refusal(pets())
    assert re.fullmatch(
        r"2 of 12 images of pets/train cannot be read \(train/cat/0\.png: cannot identify image file.*, train/cat/1\.png: .*\); "
        r"replace them, or leave them out with on_bad_image: drop\.",
        sentence,
    )


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_an_image_cut_in_half_is_found_in_every_format(pets, tmp_path, make, format):
    data = make.encoded(3, format, side=64)
    (tmp_path / "pets" / "train" / "cat" / "0.png").write_bytes(data[: len(data) // 2])
    assert refusal(pets()).startswith("1 of 12 images of pets/train cannot be read (train/cat/0.png: ")


def test_bad_images_can_be_dropped_and_are_recorded(pets, tmp_path, caplog):
    break_images(tmp_path)
    data = load_split(pets(), "train", on_bad_image="drop")
    assert data.dropped == ["train/cat/0.png", "train/cat/1.png"]
    assert len(data) == 10 and not set(data.dropped) & set(data.ids)
    assert "2 of 12 images of pets/train cannot be read: 2 of 12 examples are left out" in caplog.text


def test_quick_images_are_examined_by_one_thread_and_slow_ones_by_several_alike(pets, tmp_path, monkeypatch):
    break_images(tmp_path)
    examine, threads, read = images.EncodedImages._examine, [], []
    monkeypatch.setattr(
        images.EncodedImages,
        "_examine",
        lambda self, row: (threads.append(threading.current_thread()), examine(self, row))[1],
    )
    monkeypatch.setattr(images, "FIRST", 2)
    monkeypatch.setattr(images, "BATCH", 3)
    for quick, here in ((float("inf"), 12), (0.0, 2)):
        monkeypatch.setattr(images, "QUICK", quick)
        data = load_split(pets(), "train", on_bad_image="drop")
        read.append((data.ids, data.dropped, data.fingerprint))
        assert len(threads) == 12 and threads.count(threading.main_thread()) == here
        threads.clear()
    assert read[0] == read[1] and len(read[0][1]) == 2


def test_another_word_for_what_to_do_with_bad_images_is_refused(pets):
    assert refusal(pets(), on_bad_image="ignore") == "on_bad_image is 'ignore'; valid names are drop, refuse."


def test_a_missing_image_of_a_record(questions):
    recipe = questions({"id": "a", "image": "images/none.png", "text": "q", "answer": "a"})
    assert refusal(recipe).startswith("1 of 1 images of pets/train cannot be read (a: no such file '")
    assert (
        refusal(recipe, on_bad_image="drop") == "pets/train has no readable image left; replace the images."
    )


@pytest.fixture
def album(questions, tmp_path, make):
    """Five records over the readable images 0.png and 1.png, the broken 2.png and the missing 3.png."""
    for i in range(3):
        make.json(tmp_path / "q" / f"{i}.png", 0)
        (tmp_path / "q" / f"{i}.png").write_bytes(make.encoded(i) if i < 2 else b"broken")
    shown = {
        "none": None,
        "one": "0.png",
        "two": ["0.png", "1.png"],
        "half": ["1.png", "2.png"],
        "gone": ["3.png", "2.png"],
    }
    records = [{"id": name, "image": image, "text": "q", "answer": "a"} for name, image in shown.items()]
    return questions(*records)


def test_an_image_of_several_records_is_counted_once_and_named_by_its_first(album):
    sentence = refusal(album)
    assert sentence.startswith("2 of 4 images of pets/train cannot be read (half: cannot identify image file")
    assert "/3.png'); replace them" in sentence


def test_an_example_is_dropped_with_any_of_its_images(album, caplog):
    data = load_split(album, "train", on_bad_image="drop")
    assert data.ids == ["none", "one", "two"] and data.dropped == ["half", "gone"]
    assert "2 of 4 images of pets/train cannot be read: 2 of 5 examples are left out" in caplog.text


def test_classification_needs_exactly_one_image(questions, tmp_path, make):
    record = {"id": "a", "image": ["x.png", "y.png"], "text": "q", "answer": "cat"}
    make.json(tmp_path / "q" / "train.json", [record])
    facts = make.facts(source={"format": "llava_json", "path": "q"}, splits={"train": "train.json"})
    assert refusal(load_recipe(make.yaml(tmp_path / "q.yaml", **facts))) == (
        "'a' in pets/train has 2 images, and classification needs one; give every record one image, or use the kind vqa."
    )


# ----------------------------------------------------------------------------------- labels


def test_a_class_without_training_examples(pets, tmp_path):
    sentence = "1 of 4 classes have no example in pets/train (yak); add examples, or remove the classes from the recipe."
    recipe = pets(classes=["cat", "big_dog", "ant", "yak"])
    assert refusal(recipe) == sentence
    assert len(load_split(recipe, "test")) == 12  # a test split may lack a class


def test_a_folder_that_is_no_class(pets):
    assert refusal(pets(classes=["cat", "ant"])) == (
        "'train/big_dog/0.png' in pets/train has the label 'big_dog', which is none of the 2 classes of recipe 'pets' "
        "(and 3 more, which `llava-keeplora-eval data check` lists); "
        "correct the label, add training data of its class, or map it under 'class_names' (valid names are ant, cat)."
    )


def test_an_image_in_no_class_folder(pets, tmp_path, make):
    (tmp_path / "pets" / "train" / "x.png").write_bytes(make.encoded(0))
    assert (
        refusal(pets()) == "'train/x.png' of 'pets' lies in no class folder; move it to train/<class>/x.png."
    )


@pytest.mark.parametrize("label", [3, -1])
def test_a_number_outside_the_class_list(pets, tmp_path, make, label):
    make.parquet(tmp_path / "pets" / "train.parquet", {"image": [make.encoded(0)], "label": [label]})
    sentence = refusal(pets(source={"format": "parquet", "path": "pets"}, splits={"train": "train.parquet"}))
    assert sentence.startswith(
        f"'train-0' in pets/train has the label {label}, which is none of the 3 classes of recipe 'pets'; "
    )


def test_classes_left_to_a_source_without_names_or_with_another_number(pets, tmp_path, make):
    rows = {"image": [make.encoded(i) for i in range(2)], "label": [0, 1]}
    change = dict(
        source={"format": "parquet", "path": "pets"},
        splits={"train": "train.parquet"},
        classes="from-source",
        num_classes=3,
    )
    make.parquet(tmp_path / "pets" / "train.parquet", rows)
    assert refusal(pets(**change)) == (
        "recipe 'pets' takes its classes from the source, but the labels of pets/train come without names; "
        "list the classes in the recipe, in label order."
    )
    make.parquet(tmp_path / "pets" / "train.parquet", rows, ["a", "b"])
    assert refusal(pets(**change)).startswith("pets/train has 2 classes and recipe 'pets' expects 3; ")
    with pytest.raises(
        RecipeError, match="the classes of 'pets' are read from its data, which is not loaded yet"
    ):
        pets(**change).prompts


def test_an_image_column_that_holds_no_images(pets, tmp_path, make):
    make.parquet(tmp_path / "pets" / "train.parquet", {"image": [make.encoded(0)], "label": [0]})
    source = {"format": "parquet", "path": "pets", "columns": {"image": "label"}}
    sentence = refusal(pets(source=source, splits={"train": "train.parquet"}))
    assert sentence.startswith("the column 'label' in the train split of 'pets' holds no images (")


def test_a_missing_column_is_named_with_the_nearest_one(pets, tmp_path, make):
    make.parquet(tmp_path / "pets" / "train.parquet", {"image": [make.encoded(0)], "lable": ["cat"]})
    assert refusal(pets(source={"format": "parquet", "path": "pets"}, splits={"train": "train.parquet"})) == (
        "the train split of 'pets' has no column 'label'; did you mean 'lable'; set it with 'source.columns.label' in the recipe."
    )


# ---------------------------------------------------------------------------------- records


def test_duplicate_ids(questions):
    record = {"id": "a", "image": "x.png", "text": "q", "answer": "a"}
    assert refusal(questions(record, record)) == (
        "pets/train has 1 ids more than once (a); "
        "give every example its own id, or number them with 'source.positional_ids: [train]' in the recipe."
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"id": None},
            "record 0 of train.json has no 'id'; give every record its own id, or number them with 'source.positional_ids: [train]'",
        ),
        ({"answer": []}, "record 'a' of train.json has no answer; complete or remove the record."),
        ({"text": 3}, "record 'a' of train.json has the number 3 as its question, and a question is text; correct or remove the record."),
        ({"image": 3}, "record 'a' of train.json has 3 as its image; write one path, a list of paths, or leave 'image' out."),
        ({"image": ["x.png", None]}, "record 'a' of train.json has ['x.png', None] as its image; write one path, a list of paths, or leave"),
        ({"answer": None}, "record 'a' of train.json has no 'answer'; add it, or name the field of the answer with 'source.answer' in the recipe."),
        (
            {"conversations": [{"from": "human", "value": "q"}] * 2},
            "record 'a' of train.json has two questions in a row (turns 1 and 2, 'human'); join or remove one of them.",
        ),
    ],
)  # fmt: skip
def test_a_malformed_question_record_is_named(questions, change, sentence):
    record = {"id": "a", "image": "x.png", "text": "q", "answer": "a"} | change
    assert refusal(questions({k: v for k, v in record.items() if v is not None})).startswith(sentence)


@pytest.mark.parametrize(
    ("images", "notes", "sentence"),
    [
        ([{"id": 1, "file_name": "a.png"}], [], "1 images of train.json have no caption (first: 1); "),
        (
            [],
            [{"id": 5, "image_id": 2, "caption": "x"}],
            "entry 0 of 'annotations' in train.json is for the image 2, which is not listed; ",
        ),
        ([{"id": 1, "file_name": "a.png"}] * 2, [], "image 1 of train.json is listed twice; "),
        (
            [{"id": 1}],
            [{"image_id": 1, "caption": "x"}],
            "image 1 of train.json has nothing (null) as 'file_name', which is no path; ",
        ),
        ([{"file_name": "a.png"}], [], "entry 0 of 'images' in train.json has no 'id'; "),
        ([{"id": 1}], [{"image_id": 1}], "entry 0 of 'annotations' in train.json has no 'caption'; "),
    ],
)
def test_a_malformed_caption_file_is_named(captions, images, notes, sentence):
    assert refusal(captions(images, notes)).startswith(sentence)


def test_a_file_that_is_not_json(questions, tmp_path):
    recipe = questions()
    (tmp_path / "q" / "train.json").write_text("[{")
    assert "is not readable JSON" in refusal(recipe)
    (tmp_path / "q" / "train.json").write_text("{}")
    assert refusal(recipe) == "train.json holds a dict, not a list; correct the file."


def test_a_size_other_than_the_published_one_is_said(pets, caplog):
    load_split(pets(expected_sizes={"test": 100}), "test")
    assert "pets/test holds 12 examples and its recipe expects 100" in caplog.text
