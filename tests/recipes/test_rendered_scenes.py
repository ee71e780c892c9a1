"""Rendered scenes: images and questions are pure functions, and nothing can be answered without looking."""

import functools
import hashlib
import os
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from llava_keeplora_recipes import RecipeError, load_recipe, load_split
from llava_keeplora_recipes.drawing import CANVAS, PALETTE, SIDE
from llava_keeplora_recipes.rendered_scenes import SCENES, compose, draw

SPLITS = ("pretrain", "train", "test")
tasks = pytest.mark.parametrize("task", SCENES)
ENDS = (slice(0, 6), slice(-6, None))
QUESTIONS = [name for name, spec in SCENES.items() if spec.kind == "vqa"]


@functools.cache
def scenes(task: str, split: str) -> list:
    return [compose(task, split, i) for i in range(SCENES[task].sizes[split])]


def digest(task: str, split: str, index: int) -> str:
    scene = compose(task, split, index)
    return hashlib.sha256(draw(task, split, index).tobytes() + repr(scene).encode()).hexdigest()


def test_another_process_with_another_hash_seed_draws_and_asks_the_same():
    places = [(task, split, i) for task in SCENES for split in SPLITS for i in (0, 7)]
    code = (
        "import hashlib; from llava_keeplora_recipes.rendered_scenes import compose, draw\n"
        f"for place in {places}: print(hashlib.sha256(draw(*place).tobytes() + repr(compose(*place)).encode()).hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert there == [digest(*place) for place in places]


@tasks
def test_no_image_is_in_two_splits_or_twice_in_one(task):
    seen = [draw(task, split, i).tobytes() for split in SPLITS for i in range(24)]
    assert len(seen) == len(set(seen))


@tasks
def test_images_are_small_rgb_images_and_half_of_the_test_images_have_a_plain_background(task):
    images = [draw(task, "test", i) for i in range(80)]
    assert {(image.mode, image.size) for image in images} == {("RGB", (SIDE, SIDE))}
    # the plain style's sensor noise has a deviation of 3 on one colour; the other's is at least 4, on a gradient
    corners = [
        np.asarray(image, float)[rows, columns] for image in images for rows in ENDS for columns in ENDS
    ]
    noise = np.array([corner.std(axis=(0, 1)).mean() for corner in corners]).reshape(-1, 4).min(axis=1)
    assert 25 < (noise < 3.5).sum() < 55


def nearest_colour(pixels: np.ndarray) -> str:
    return min(PALETTE, key=lambda name: np.abs(pixels - PALETTE[name]).sum())


@tasks
def test_what_a_scene_says_stands_in_its_image(task):
    right, total = 0, 0
    for i in range(0, 60):
        pixels = np.asarray(draw(task, "pretrain", i), float)
        side = CANVAS // 3 // 2
        for thing in compose(task, "pretrain", i).things:
            x, y = (int((place + 0.5) * side) for place in thing.cell)
            right += nearest_colour(pixels[y - 1 : y + 2, x - 1 : x + 2].mean(axis=(0, 1))) == thing.colour
            total += 1
    assert right / total > 0.97


@tasks
def test_no_two_things_share_a_cell_and_all_cells_lie_in_the_image(task):
    for scene in scenes(task, "test"):
        cells = [thing.cell for thing in scene.things]
        assert len(set(cells)) == len(cells)
        assert all(0 <= place < 3 for cell in cells for place in cell)


def true_answer(scene) -> str:
    """The answer to a scene's question, read from the question's words and the list of things alone."""
    words = scene.question.rstrip("?").split()
    if words[:2] == ["What", "color"]:
        (thing,) = [t for t in scene.things if t.shape == words[-1]]
        return thing.colour
    if words[:2] == ["How", "many"]:
        return str(sum(t.shape == words[2].removesuffix("s") for t in scene.things))
    if words[:2] == ["Is", "there"]:
        return "yes" if any((t.colour, t.shape) == tuple(words[3:]) for t in scene.things) else "no"
    assert words[:2] == ["What", "is"]
    (anchor,) = [t for t in scene.things if t.shape == words[-1]]
    dx, dy = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[words[2]]
    (thing,) = [t for t in scene.things if t.cell == (anchor.cell[0] + dx, anchor.cell[1] + dy)]
    return f"{thing.colour} {thing.shape}"


@pytest.mark.parametrize("task", QUESTIONS)
def test_the_answer_follows_from_the_things_and_the_question(task):
    for scene in scenes(task, "test") + scenes(task, "train"):
        assert list(scene.answers) == [true_answer(scene)]


@pytest.mark.parametrize(
    ("task", "rate"),
    [("scene-colour", 1 / 4), ("scene-count", 1 / 4), ("scene-exists", 1 / 2), ("scene-relation", 1 / 12)],
)
def test_the_question_alone_says_nothing_about_the_answer(task, rate):
    known = defaultdict(Counter)
    for scene in scenes(task, "train") + scenes(task, "pretrain"):
        known[scene.question][scene.answers[0]] += 1
    test = scenes(task, "test")
    guessed = sum(known[s.question].most_common(1)[0][0] == s.answers[0] for s in test) / len(test)
    error = np.sqrt(rate * (1 - rate) / len(test))
    assert abs(guessed - rate) < 3 * error, f"{guessed:.3f} of {task} can be guessed"


@pytest.mark.parametrize("task", ["scene-colour", "scene-count", "scene-exists"])
def test_answers_are_balanced_in_every_split(task):
    for split in SPLITS:
        counts = Counter(scene.answers[0] for scene in scenes(task, split))
        assert len(set(counts.values())) == 1 and len(counts) == (2 if task == "scene-exists" else 4)


def test_the_captions_of_a_scene_are_true_and_differ():
    for scene in scenes("scene-captions", "test"):
        first, second = scene.things
        words = scene.answers[0].rstrip(".").split()
        dx, dy = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[words[3]]
        assert (words[1], words[2]) == (first.colour, first.shape) and tuple(words[-2:]) == (
            second.colour,
            second.shape,
        )
        assert (first.cell[0] - second.cell[0], first.cell[1] - second.cell[1]) == (dx, dy)
        assert len(set(scene.answers)) == 3


@tasks
def test_a_recipe_loads_every_scene_without_drawing_it(task):
    recipe = load_recipe(task)
    for split in SPLITS:
        data = load_split(recipe, split)
        assert len(data) == recipe.expected_sizes[split] == SCENES[task].sizes[split]
        assert data.ids[3] == f"{task}-v1-{split}-00003" and data.labels[3] is None
    example, scene = data[5], compose(task, "test", 5)
    assert example.question == (scene.question or "Describe the image.")
    assert tuple(example.answers) == scene.answers
    assert example.image.tobytes() == draw(task, "test", 5).tobytes()


def test_a_scene_recipe_of_another_kind_is_refused(tmp_path, make):
    path = make.yaml(
        tmp_path / "mine.yaml",
        name="mine",
        kind="captioning",
        metric="exact_match",
        licence="MIT",
        source={"format": "rendered", "task": "scene-count"},
    )
    sentence = "mine.yaml is of the kind captioning, and the rendered task 'scene-count' is vqa; write 'kind: vqa' in"
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (("scene-color", "test", 0), "did you mean 'scene-colour'"),
        (("scene-count", "tset", 0), "did you mean 'test'"),
        (("scene-count", "test", 300), "0 to 299"),
        (("scene-count", "test", -1), "0 to 299"),
    ],
)
def test_a_scene_that_does_not_exist_is_refused_with_a_hint(call, words):
    with pytest.raises(RecipeError, match=words):
        draw(*call)


def test_a_raised_version_draws_other_scenes(monkeypatch):
    before = digest("scene-count", "test", 0)
    monkeypatch.setitem(SCENES, "scene-count", replace(SCENES["scene-count"], version=2))
    assert digest("scene-count", "test", 0) != before
