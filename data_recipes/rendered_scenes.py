"""Rendered scenes: questions and captions about a few coloured shapes, without files and network.

`compose(task, split, index)` returns the things in a scene, the question and the answers; `draw(task, split,
index)` draws it. Both are pure functions of their arguments and of the task's version, like
`rendered.render`, with the same two styles. The content of a scene does not depend on the style.

No task can be solved without the image. The answers of `scene-colour`, `scene-count` and `scene-exists` take
turns, and their questions are drawn independently of the answer: a guess from the question alone is right in
1/4, 1/4 and 1/2 of them. `scene-relation` asks for one of twelve equally likely things.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

from numpy.random import Generator
from PIL import Image, ImageDraw

from .drawing import CANVAS, PALETTE, PLAIN_SHARE, canvas, clutter, finish, generator, jitter, outline
from .errors import RecipeError, nearest

COLOURS = list(PALETTE)
SHAPES = ["circle", "square", "triangle", "star"]
CELLS = list(product(range(3), range(3)))  # (column, row), from the top left
STEPS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """A coloured shape in one of the nine cells of a scene."""

    colour: str
    shape: str
    cell: tuple[int, int]

    @property
    def name(self) -> str:
        """Return colour and shape in words."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The things in an image, and a question about them; None if the recipe's instruction is the question."""

    things: tuple[Thing, ...]
    question: str | None
    answers: tuple[str, ...]


@dataclass(frozen=True)
class SceneTask:
    """A task on rendered scenes.

    Attributes:
        kind: `vqa` or `captioning`.
        compose: function of a generator and a scene's index in the split that returns the scene.
        instruction: the question of a captioning task.
        version: a number to raise when the images, questions or answers change.
        sizes: number of scenes per split.
    """

    kind: str
    compose: Callable[[Generator, int], Scene]
    instruction: str | None = None
    version: int = 1
    sizes: dict[str, int] = field(default_factory=lambda: {"pretrain": 2400, "train": 960, "test": 300})


def compose(task: str, split: str, index: int) -> Scene:
    """Return the things, the question and the answers of scene `index` of a split.

    Raises:
        RecipeError: the task, the split or the index does not exist.
    """
    if task not in SCENES:
        raise RecipeError(f"there is no rendered scene task '{task}'", nearest(task, SCENES))
    spec = SCENES[task]
    if split not in spec.sizes:
        raise RecipeError(f"rendered task '{task}' has no split '{split}'", nearest(split, spec.sizes))
    if not 0 <= index < spec.sizes[split]:
        raise RecipeError(
            f"rendered task '{task}' has no {split} image {index}", f"ask for 0 to {spec.sizes[split] - 1}"
        )
    return spec.compose(generator("scene", task, spec.version, split, index), index)


def draw(task: str, split: str, index: int) -> Image.Image:
    """Draw scene `index` of a split, a 48 x 48 RGB image.

    Raises:
        RecipeError: the task, the split or the index does not exist.
    """
    scene = compose(task, split, index)
    rng = generator("picture", task, SCENES[task].version, split, index)
    plain = rng.random() < PLAIN_SHARE[split]
    image = canvas(rng, plain)
    pen = ImageDraw.Draw(image)
    if not plain:
        clutter(rng, pen, 5)
    side = CANVAS / 3
    for thing in scene.things:
        radius = rng.uniform(13, 15) if plain else rng.uniform(9, 14)
        x, y = ((place + 0.5) * side + rng.uniform(-1, 1) * (1 if plain else 3) for place in thing.cell)
        turn = rng.uniform(-0.1, 0.1) if plain else rng.uniform(0, 2 * math.pi)
        fill = jitter(rng, PALETTE[thing.colour], 10 if plain else 30)
        pen.polygon(outline(thing.shape, x, y, radius, turn), fill=fill)
    return finish(rng, image, plain)


# --------------------------------------------------------------------------------------- composing


def _pick(rng: Generator, options: list, count: int) -> list:
    """Return `count` different options in a random order."""
    return [options[i] for i in rng.permutation(len(options))[:count]]


def _scatter(rng: Generator, looks: list[tuple[str, str]]) -> tuple[Thing, ...]:
    """Return things with these colours and shapes in different cells."""
    cells = _pick(rng, CELLS, len(looks))
    return tuple(Thing(colour, shape, cell) for (colour, shape), cell in zip(looks, cells, strict=True))


def _colour(rng: Generator, index: int) -> Scene:
    """Compose a scene of two or three different shapes, and ask for the colour of one of them."""
    shapes = _pick(rng, SHAPES, int(rng.integers(2, 4)))
    answer = COLOURS[index % 4]
    looks = [(answer, shapes[0])] + [(str(rng.choice(COLOURS)), shape) for shape in shapes[1:]]
    return Scene(_scatter(rng, looks), f"What color is the {shapes[0]}?", (answer,))


def _count(rng: Generator, index: int) -> Scene:
    """Compose a scene of one to four of a kind and up to three others, and ask how many there are."""
    number = index % 4 + 1
    kind, *others = _pick(rng, SHAPES, 4)
    shapes = [kind] * number + [str(rng.choice(others)) for _ in range(rng.integers(0, 4))]
    looks = [(str(rng.choice(COLOURS)), shape) for shape in shapes]
    return Scene(_scatter(rng, looks), f"How many {kind}s are there?", (str(number),))


def _exists(rng: Generator, index: int) -> Scene:
    """Compose a scene of two or three things, and ask whether a thing is in it.

    If it is not, another thing has its colour or its shape.
    """
    present = index % 2 == 0
    everything = list(product(COLOURS, SHAPES))
    asked, *rest = _pick(rng, everything, len(everything))
    near = [look for look in rest if (look[0] == asked[0]) != (look[1] == asked[1])]
    looks = ([asked] if present else near[:1]) + _pick(rng, rest, int(rng.integers(1, 3)))
    colour, shape = asked
    return Scene(_scatter(rng, looks), f"Is there a {colour} {shape}?", ("yes" if present else "no",))


def _neighbours(cell: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Return the neighbours of a cell, by their relation to it."""
    neighbours = {name: (cell[0] + dx, cell[1] + dy) for name, (dx, dy) in STEPS.items()}
    return {name: place for name, place in neighbours.items() if place in CELLS}


def _relation(rng: Generator, index: int) -> Scene:
    """Compose a scene of a shape with two neighbours, and ask for the neighbour in some relation to it."""
    relation = list(STEPS)[index % 4]
    anchor = _pick(rng, [cell for cell in CELLS if relation in _neighbours(cell)], 1)[0]
    neighbours = _neighbours(anchor)
    decoy = _pick(rng, [name for name in neighbours if name != relation], 1)[0]
    kinds = _pick(rng, SHAPES, 3)
    colours = [str(rng.choice(COLOURS)) for _ in kinds]
    cells = [anchor, neighbours[relation], neighbours[decoy]]
    things = tuple(Thing(*facts) for facts in zip(colours, kinds, cells, strict=True))
    return Scene(things, f"What is {relation} the {kinds[0]}?", (things[1].name,))


def _caption(rng: Generator, index: int) -> Scene:
    """Compose a scene of two neighbouring things, with several captions."""
    relation = list(STEPS)[index % 4]
    second = _pick(rng, [cell for cell in CELLS if relation in _neighbours(cell)], 1)[0]
    (colour, shape), (other_colour, other_shape) = _pick(rng, list(product(COLOURS, SHAPES)), 2)
    things = (
        Thing(colour, shape, _neighbours(second)[relation]),
        Thing(other_colour, other_shape, second),
    )
    return Scene(things, None, _sentences(*things, relation))


def _sentences(first: Thing, second: Thing, relation: str) -> tuple[str, ...]:
    return (
        f"a {first.name} {relation} a {second.name}.",
        f"a {second.name} {OPPOSITE[relation]} a {first.name}.",
        f"a {first.name} and a {second.name}.",
    )


SCENES: dict[str, SceneTask] = {
    "scene-colour": SceneTask("vqa", _colour),
    "scene-count": SceneTask("vqa", _count),
    "scene-relation": SceneTask("vqa", _relation),
    "scene-exists": SceneTask("vqa", _exists),
    "scene-captions": SceneTask("captioning", _caption, "Describe the image."),
}
