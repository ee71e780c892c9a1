"""No path and no link of a task leads out of its data root, in any format; each refusal names file and record."""

import datasets
import pytest

from llava_keeplora_recipes import load_recipe, load_split
from llava_keeplora_recipes.errors import RecipeError


@pytest.fixture
def outside(tmp_path, make):
    """An image, and a folder of one, beside the data root."""
    (tmp_path / "private/cat").mkdir(parents=True)
    (tmp_path / "private/cat/0.png").write_bytes(make.encoded(1))
    return tmp_path / "private/cat/0.png"


@pytest.fixture
def root(tmp_path, make):
    """A data root with an image folder."""
    return make.folder(tmp_path / "data")


@pytest.fixture
def load(tmp_path, root, make):
    """Function (**changes of the recipe) → its training split."""
    return lambda **changes: load_split(
        load_recipe(make.yaml(tmp_path / "pets.yaml", **make.facts(**changes))), "train", root
    )


QUESTIONS = {
    "kind": "vqa",
    "metric": "exact_match",
    "prompt": None,
    "classes": None,
    "splits": {"train": "train.json"},
}


def asked(root, make, image):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat"}]
    make.json(root / "pets/train.json", [{"id": "first", "image": image, "conversations": turns}])
    return QUESTIONS | {"source": {"format": "llava_json", "path": "pets"}}


def captioned(root, make, image):
    make.json(
        root / "pets/train.json",
        {"images": [{"id": 7, "file_name": image}], "annotations": [{"image_id": 7, "caption": "A cat"}]},
    )
    return QUESTIONS | {
        "kind": "captioning",
        "metric": "caption_rouge_l",
        "prompt": "Say.",
        "source": {"format": "coco_captions", "path": "pets", "images": "."},
    }


def refusal(load, **changes) -> str:
    with pytest.raises(RecipeError) as caught:
        load(**changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("write", "what"), [(asked, "record 'first' of train.json"), (captioned, "image 7 of train.json")]
)
def test_a_record_whose_image_is_a_link_out_of_the_data_root_is_refused_by_name(
    load, root, make, outside, write, what
):
    (root / "pets/link.png").symlink_to(outside)
    sentence = refusal(load, **write(root, make, "link.png"))
    assert sentence == (
        f"{what} has the path '{root}/pets/link.png', which leads to '{outside}' and so out of '{root}'; "
        "put the file itself there, or give a --data-root that holds both."
    )


@pytest.mark.parametrize("write", [asked, captioned])
@pytest.mark.parametrize(
    "image", ["../../private/cat/0.png", "/etc/hostname", "a/../../../private/cat/0.png", "a\0b.png"]
)
def test_a_record_whose_path_leads_out_is_refused_by_name(load, root, make, outside, write, image):
    sentence = refusal(load, **write(root, make, image))
    assert (
        f"of train.json has the path {image!r}, which leads out of its data folder; use a path inside the folder."
        in sentence
    )


def test_a_folder_on_the_way_that_is_a_link_out_is_refused_too(load, root, make, outside):
    (root / "pets/images").symlink_to(outside.parent)
    assert "and so out of" in refusal(load, **asked(root, make, "images/0.png"))


def test_a_link_inside_the_data_root_is_followed(load, root, make):
    (root / "shared").mkdir()
    (root / "shared/0.png").write_bytes(make.encoded(3))
    (root / "pets/link").symlink_to(root / "shared")
    assert load(**asked(root, make, "link/0.png"))[0].image.size == (12, 12)


def test_the_folder_of_a_task_may_be_a_link_itself(tmp_path, root, make, load):
    (root / "pets").rename(tmp_path / "elsewhere")
    (root / "pets").symlink_to(tmp_path / "elsewhere")
    assert len(load()) == 12


@pytest.mark.parametrize("name", ["train/cat/link.png", "train/cat/linked", "test"])
def test_an_image_folder_with_a_link_out_is_refused(load, root, outside, name):
    import shutil

    if name == "test":
        shutil.rmtree(root / "pets/train")
        name = "train"
    (root / "pets" / name).symlink_to(outside if name.endswith("png") else outside.parents[1])
    assert f"the path '{root}/pets/{name}" in (sentence := refusal(load)) and "and so out of" in sentence


def test_a_parquet_file_that_is_a_link_out_is_refused(load, root, make, tmp_path):
    make.parquet(tmp_path / "private.parquet", {"image": [make.encoded(1)], "label": ["cat"]})
    (root / "pets/train.parquet").symlink_to(tmp_path / "private.parquet")
    assert "and so out of" in refusal(
        load, source={"format": "parquet", "path": "pets"}, splits={"train": "train.parquet"}
    )


def test_a_parquet_cell_that_names_a_file_elsewhere_instead_of_holding_one_is_refused(load, root, outside):
    rows = {"image": [{"bytes": None, "path": str(outside)}], "label": ["cat"]}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(root / "pets/train.parquet"))
    sentence = refusal(load, source={"format": "parquet", "path": "pets"}, splits={"train": "train.parquet"})
    assert f"record 'train-0' in pets/train (column 'image') has the path '{outside}'" in sentence


def test_references_that_are_a_link_out_are_refused(load, root, make, tmp_path):
    make.json(tmp_path / "answers.json", {"data": [{"question_id": "first", "answers": ["a"]}]})
    (root / "pets/answers.json").symlink_to(tmp_path / "answers.json")
    facts = asked(root, make, "train/cat/0.png")
    facts["source"] |= {"references": {"train": "answers.json"}}
    assert "'source.references' of recipe 'pets' has the path" in refusal(load, **facts)
