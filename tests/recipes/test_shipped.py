"""Every recipe in the package is complete; the real ones load with the sizes they promise."""

import pytest

from llava_keeplora_eval.metrics import METRICS
from llava_keeplora_recipes import list_recipes, load_recipe, load_split

MTIL_TEST_SIZES = dict(
    aircraft=3333, caltech101=1736, cifar100=10000, dtd=1880, eurosat=5400, flowers=6149, food=25250,
    mnist=10000, oxfordpet=3669, stanfordcars=8041, sun397=21751,
)  # fmt: skip
REAL = ("caltech101", "fashion", "bloodcells", "omniglot", "trashnet", "signdigits", "emoji")
ASKED = ("easy-vqa", "nlvr", "flags-vqa", "flags-captions", "emoji-names")


#: Tests of general ability, without training data.
GENERAL = ("pope/random", "pope/popular", "pope/adversarial", "mme", "mmbench", "seed-bench")


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_is_complete(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.metric in METRICS
    assert (recipe.metric == "accuracy") == (recipe.kind == "classification")
    assert recipe.licence and recipe.description and "test" in recipe.splits
    assert ("train" in recipe.splits) == (name not in GENERAL)
    assert len(recipe.fingerprint) == 64
    if recipe.kind == "classification" and recipe.classes is not None:
        assert len(set(recipe.prompts)) == len(recipe.classes)


def test_no_two_recipes_share_a_fingerprint():
    prints = [load_recipe(n).fingerprint for n in list_recipes()]
    assert len(set(prints)) == len(prints)


def test_mtil_has_the_published_test_sizes_and_1201_classes():
    recipes = {n: load_recipe(f"mtil/{n}") for n in MTIL_TEST_SIZES}
    assert {n: r.expected_sizes["test"] for n, r in recipes.items()} == MTIL_TEST_SIZES
    assert sum(r.num_classes for r in recipes.values()) == 1201


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("mnist", ["0", "7"]),
        ("eurosat", ["SeaLake", "Annual Crop"]),
        ("caltech101", ["Faces_easy", "yin_yang"]),
    ],
)
def test_mtil_tasks_read_the_labels_that_their_sources_use(tmp_path, make, task, labels):
    make.parquet(
        tmp_path / "set" / "test.parquet", {"image": [make.encoded(0), make.encoded(1)], "label": labels}
    )
    source = {"format": "parquet", "path": "set"}
    path = make.yaml(
        tmp_path / "mine.yaml",
        extends=f"mtil/{task}",
        source=source,
        splits={"test": "test.parquet"},
        expected_sizes={},
    )
    answers = [e.answers[0] for e in load_split(load_recipe(path), "test")]
    assert answers == {
        "mnist": ["0 - zero", "7 - seven"], "eurosat": ["lake or sea", "annual crop land"],
        "caltech101": ["centered face", "yin and yang symbol"],
    }[task]  # fmt: skip


#: One of each kind; the others behind the slow marker.
LOADED = ("trashnet", "flags-captions", "emoji-names")


@pytest.mark.parametrize(
    "name", [name if name in LOADED else pytest.param(name, marks=pytest.mark.slow) for name in REAL + ASKED]
)
def test_real_sets_load_with_the_promised_sizes(name, real_data):
    recipe = load_recipe(name)
    for split, size in recipe.expected_sizes.items():
        data = load_split(recipe, split, real_data)
        assert len(data) == size and not data.dropped
        assert data[0].image.mode == "RGB"


def test_no_real_training_image_is_a_test_image(real_data):
    recipe = load_recipe("trashnet")
    seen = [set(load_split(recipe, split, real_data).digests) for split in recipe.splits]
    assert not seen[0] & seen[1] and not seen[1] & seen[2] and not seen[0] & seen[2]


@pytest.mark.parametrize("name", ASKED)
def test_real_questions_and_captions_come_without_image_placeholders(name, real_data):
    data = load_split(load_recipe(name), "test", real_data)
    for question, answers in zip(data.questions, data.answers, strict=True):
        assert question and "<image>" not in question
        assert answers and all(answers)
