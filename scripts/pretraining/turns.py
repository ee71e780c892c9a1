"""Training data of the models that answer: images, and for each of them questions with their answers."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from numpy.random import Generator
from pretraining.images import REAL, small_images

from llava_keeplora_recipes import TaskData, load_recipe, load_split
from llava_keeplora_recipes.drawing import PALETTE, generator
from llava_keeplora_recipes.rendered import RENDERED, captions
from llava_keeplora_recipes.rendered_scenes import CELLS, SCENES, SHAPES, STEPS, Scene, Thing, compose

QUESTIONS = ["easy-vqa", "nlvr", "flags-vqa", "flags-captions", "emoji-names"]
DESCRIBE = "Describe the image."
NUMBERS = ["1", "2", "3", "4", "5", "6"]
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")

Turn = tuple[str, str]


@dataclass
class TaughtSet:
    """One set in memory.

    Attributes:
        name: the recipe's name.
        pixels: uint8, N x 3 x 48 x 48.
        turns: about each image; the first one is what the task itself asks.
        shapes: height and width of each image's file; not part of the fingerprint.
    """

    name: str
    pixels: torch.Tensor
    turns: list[list[Turn]]
    shapes: list[tuple[int, int]]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.pixels.numpy().tobytes())
        digest.update(json.dumps(self.turns).encode())
        return digest.hexdigest()


def taught_sets(root: Path) -> list[TaughtSet]:
    """Return every `pretrain` split.

    Rendered scenes, rendered classes, real classes, real questions and captions.
    """
    return [taught_set(name, root) for name in (*SCENES, *RENDERED, *REAL, *QUESTIONS)]


def taught_set(name: str, root: Path) -> TaughtSet:
    """Return one set with its turns."""
    data = load_split(load_recipe(name), "pretrain", root)
    if name in QUESTIONS:
        return _asked(data)
    turns_of = _scene_turns if name in SCENES else _class_turns
    pixels, shapes = small_images(data)
    return TaughtSet(name, pixels, [turns_of(data, i) for i in range(len(data))], shapes)


def _asked(data: TaskData) -> TaughtSet:
    """Return a set with questions or captions of its own; those about one image stand together."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, digest in enumerate(data.digests):
        groups[digest].append(i)
    questions, answers = data.questions, data.answers
    turns = [[(questions[i], answer) for i in group for answer in answers[i]] for group in groups.values()]
    pixels, shapes = small_images(data.take(group[0] for group in groups.values()))
    return TaughtSet(data.recipe.name, pixels, turns, shapes)


# ----------------------------------------------------------------------------------------- classes


def _class_turns(data: TaskData, index: int) -> list[Turn]:
    """Return what a classification task asks, a caption, and whether it is this class or another one."""
    recipe, label = data.recipe, data.labels[index]
    words = [c.replace("_", " ") for c in recipe.classes]
    rng = generator("class turns", recipe.name, index)
    other = words[(label + 1 + int(rng.integers(len(words) - 1))) % len(words)]
    texts = (
        captions(recipe.name, label)
        if recipe.name in RENDERED
        else [recipe.prompts[label], f"{words[label]}."]
    )
    turns = [
        (recipe.vlm_prompt, words[label]),
        (DESCRIBE, str(rng.choice(texts))),
        (f"Is this {words[label]}?", "yes") if rng.random() < 0.5 else (f"Is this {other}?", "no"),
    ]
    if recipe.name == "shapes":
        colour, shape = words[label].split()
        turns += [(f"What color is the {shape}?", colour), _exists(rng, {words[label]})]
    if recipe.name == "counting":
        turns += [("How many objects are there?", NUMBERS[label])]
    return turns


# ------------------------------------------------------------------------------------------ scenes


def _scene_turns(data: TaskData, index: int) -> list[Turn]:
    """Return a scene's own question, and others that its things answer."""
    name = data.recipe.name
    scene = compose(name, "pretrain", index)
    rng = generator("scene turns", name, index)
    scene_turn = (scene.question or data.recipe.prompt, scene.answers[0])
    others = [
        ("List the things.", ", ".join(t.name for t in sorted(scene.things, key=lambda t: t.cell[::-1]))),
        *_colours(scene),
        *_places(scene),
        *_cells(scene, rng),
        *_relations(scene),
        _exists(rng, {t.name for t in scene.things}),
        _exists(rng, {t.name for t in scene.things}),
    ]
    if name == "scene-count":
        others += [(f"How many {kind}s are there?", str(number)) for kind, number in _kinds(scene).items()]
    return [scene_turn, *dict.fromkeys(turn for turn in others if turn != scene_turn)]


def _kinds(scene: Scene) -> dict[str, int]:
    shapes = [t.shape for t in scene.things]
    return {shape: shapes.count(shape) for shape in SHAPES if shape in shapes}


def _alone(scene: Scene) -> list[Thing]:
    """Return the things whose shape no other one has."""
    return [t for t in scene.things if _kinds(scene)[t.shape] == 1]


def _colours(scene: Scene) -> list[Turn]:
    return [(f"What color is the {t.shape}?", t.colour) for t in _alone(scene)]


def _place(cell: tuple[int, int]) -> str:
    return f"{ROWS[cell[1]]} {COLUMNS[cell[0]]}"


def _places(scene: Scene) -> list[Turn]:
    return [(f"Where is the {t.shape}?", _place(t.cell)) for t in _alone(scene)]


def _cells(scene: Scene, rng: Generator) -> list[Turn]:
    """Return the contents of every cell that holds something, and of one that doesn't."""
    at = {t.cell: t.name for t in scene.things}
    free = [cell for cell in CELLS if cell not in at]
    asked = [*at, free[rng.integers(len(free))]]
    return [(f"What is at the {_place(cell)}?", at.get(cell, "nothing")) for cell in asked]


def _relations(scene: Scene) -> list[Turn]:
    at = {t.cell: t for t in scene.things}
    return [
        (f"What is {relation} the {t.shape}?", at[place].name)
        for t in _alone(scene)
        for relation, (dx, dy) in STEPS.items()
        if (place := (t.cell[0] + dx, t.cell[1] + dy)) in at
    ]


def _exists(rng: Generator, there: set[str]) -> Turn:
    """Ask whether a thing is there.

    One of those that are, or one that shares a colour or a shape with one of them.
    """
    known = str(rng.choice(sorted(there)))
    if rng.random() < 0.5:
        return f"Is there a {known}?", "yes"
    colour, shape = known.split()
    near = [f"{c} {shape}" for c in PALETTE] + [f"{colour} {s}" for s in SHAPES]
    return f"Is there a {rng.choice([n for n in near if n not in there])}?", "no"
