"""The rendered world: the same call draws the same bytes, and no image is in two splits."""

import hashlib
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from llava_keeplora_recipes.errors import RecipeError
from llava_keeplora_recipes.rendered import RENDERED, captions, digit_rows, render

SPLITS = ("pretrain", "train", "test")
tasks = pytest.mark.parametrize("task", RENDERED)


def digest(task: str, split: str, index: int) -> str:
    return hashlib.sha256(render(task, split, index)[0].tobytes()).hexdigest()


def sample(task: str, split: str, count: int = 24) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, RENDERED[task].sizes[split] - 1, count)})


@tasks
def test_drawing_an_image_again_gives_the_same_bytes(task):
    for split in SPLITS:
        again = [digest(task, split, i) for i in (5, 0, 11)]
        assert again == [digest(task, split, i) for i in (5, 0, 11)]


def test_another_process_with_another_hash_seed_draws_the_same_bytes():
    code = (
        "import hashlib; from llava_keeplora_recipes.rendered import RENDERED, render\n"
        "print(*[hashlib.sha256(render(t, s, i)[0].tobytes()).hexdigest()"
        " for t in RENDERED for s in ('pretrain', 'train', 'test') for i in (0, 7)])"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert there == [digest(t, s, i) for t in RENDERED for s in SPLITS for i in (0, 7)]


@tasks
def test_no_image_is_in_two_splits_or_twice_in_one(task):
    seen = [digest(task, split, i) for split in SPLITS for i in sample(task, split)]
    assert len(seen) == len(set(seen))


@tasks
def test_labels_are_balanced_and_every_class_appears(task):
    spec = RENDERED[task]
    for split in ("train", "test"):
        # labels do not depend on the drawing, so a stretch of whole rounds stands for the split
        rounds = 2 * len(spec.classes)
        counts = Counter(render(task, split, i)[1] for i in range(rounds))
        assert counts == dict.fromkeys(range(len(spec.classes)), 2)
        last = render(task, split, spec.sizes[split] - 1)[1]
        assert last == (spec.sizes[split] - 1) % len(spec.classes)


@tasks
def test_images_are_small_rgb_images_with_something_in_them(task):
    for split in SPLITS:
        image, label, identity = render(task, split, 3)
        assert (image.mode, image.size) == ("RGB", (48, 48))
        assert 0 <= label < len(RENDERED[task].classes)
        assert np.asarray(image).std() > 3
        assert identity == f"{task}-v{RENDERED[task].version}-{split}-00003"


def test_digits_shows_every_scan_in_one_split_at_most():
    rows = {split: digit_rows(split) for split in SPLITS}
    assert {split: len(found) for split, found in rows.items()} == RENDERED["digits"].sizes
    together = [row for found in rows.values() for row in found]
    assert len(together) == len(set(together))
    assert min(together) >= 0 and max(together) < 1797


def test_digits_images_carry_the_label_of_their_scan():
    from sklearn.datasets import load_digits

    truth = load_digits().target
    assert Counter(int(truth[row]) for row in digit_rows("test")) == dict.fromkeys(range(10), 30)
    labels = Counter(render("digits", "test", i)[1] for i in range(RENDERED["digits"].sizes["test"]))
    assert labels == dict.fromkeys(range(10), 30)


@tasks
def test_the_first_caption_is_the_classification_prompt(task):
    spec = RENDERED[task]
    firsts = [captions(task, label)[0] for label in range(len(spec.classes))]
    assert firsts == [spec.prompt.format(c=c) for c in spec.classes]
    everything = [text for label in range(len(spec.classes)) for text in captions(task, label)]
    assert len(everything) == len(set(everything)) >= 3 * len(spec.classes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (("shape", "test", 0), "did you mean 'shapes'"),
        (("shapes", "tset", 0), "did you mean 'test'"),
        (("shapes", "test", 300), "0 to 299"),
        (("shapes", "test", -1), "0 to 299"),
    ],
)
def test_an_image_that_does_not_exist_is_refused_with_a_hint(call, words):
    with pytest.raises(RecipeError, match=words):
        render(*call)
