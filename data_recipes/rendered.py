"""Rendered tasks: small image classification tasks that need no files and no network.

`render(task, split, index)` draws one image as a pure function of its arguments and of the task's version:
the random generator is seeded with a SHA-256 of them, so any process on any machine draws the same bytes with
the same library versions. `digits` has scikit-learn's scans of handwriting; everything else is drawn with
Pillow and the fonts that come with matplotlib.

Every task has three splits. `pretrain` is mostly drawn in a plain style (clean background, few colours and
fonts, little jitter); half of `train` and `test` has a richer one, so that a model pre-trained on the first
has some zero-shot accuracy and still something to learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from .drawing import (
    CANVAS,
    PALETTE,
    PLAIN_SHARE,
    canvas,
    clutter,
    finish,
    generator,
    ink_and_paper,
    jitter,
    load_font,
    outline,
    write,
)
from .errors import RecipeError, nearest

Draw = Callable[[Generator, int, bool], Image.Image]


@dataclass(frozen=True)
class RenderedTask:
    """A rendered classification task.

    Attributes:
        classes: class names; a label is an index into them.
        prompt: the classification prompt, with `{c}` for the class name.
        draw: function of a generator, a label and whether the style is plain that draws one image; None for
            scans.
        templates: further captions for pre-training, with `{c}`.
        version: a number to raise when the images change.
        sizes: number of images per split.
    """

    classes: list[str]
    prompt: str
    draw: Draw | None
    templates: tuple[str, ...]
    version: int = 1
    sizes: dict[str, int] = field(default_factory=lambda: {"pretrain": 720, "train": 960, "test": 300})


def render(task: str, split: str, index: int) -> tuple[Image.Image, int, str]:
    """Draw image `index` of a split, and return it (48 x 48, RGB) with its label and its id.

    Labels are `index % number of classes`, so they are balanced.

    Raises:
        RecipeError: the task, the split or the index does not exist.
    """
    spec = _task(task)
    if split not in spec.sizes:
        raise RecipeError(f"rendered task '{task}' has no split '{split}'", nearest(split, spec.sizes))
    if not 0 <= index < spec.sizes[split]:
        raise RecipeError(
            f"rendered task '{task}' has no {split} image {index}",
            f"ask for 0 to {spec.sizes[split] - 1}",
        )
    label = label_of(task, index)
    rng = generator("picture", task, spec.version, split, index)
    plain = rng.random() < PLAIN_SHARE[split]
    if spec.draw:
        image = spec.draw(rng, label, plain)
    else:
        scans, rows = _digit_scans()
        image = _digit(rng, scans[rows[split][label][index // len(spec.classes)]], plain)
    return image, label, f"{task}-v{spec.version}-{split}-{index:05d}"


def label_of(task: str, index: int) -> int:
    """Return the label of image `index` of any split, without drawing it."""
    return index % len(_task(task).classes)


def captions(task: str, label: int) -> list[str]:
    """Return captions of a class for pre-training; the first one is the classification prompt."""
    spec = _task(task)
    return [t.format(c=spec.classes[label]) for t in (spec.prompt, *spec.templates)]


def _task(name: str) -> RenderedTask:
    if name not in RENDERED:
        raise RecipeError(f"there is no rendered task '{name}'", nearest(name, RENDERED))
    return RENDERED[name]


# --------------------------------------------------------------------------------------- digits

DIGITS_PER_CLASS = {"pretrain": 54, "train": 90, "test": 30}


@cache
def _digit_scans() -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
    """Return the scans (n, 8, 8), and split → for each digit the rows that belong to it."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    rows: dict[str, list[np.ndarray]] = {split: [] for split in DIGITS_PER_CLASS}
    for digit in range(10):
        order = generator("digits", digit).permutation(np.flatnonzero(scans.target == digit))
        start = 0
        for split, count in DIGITS_PER_CLASS.items():
            rows[split].append(order[start : start + count])
            start += count
    return scans.images, rows


def digit_rows(split: str) -> list[int]:
    """Return the rows of scikit-learn's `load_digits` in a split of `digits`; splits share none."""
    return sorted(int(i) for rows in _digit_scans()[1][split] for i in rows)


def _digit(rng: Generator, scan: np.ndarray, plain: bool) -> Image.Image:
    strokes = (scan * (255 / 16)).astype(np.uint8)
    ink, paper = ink_and_paper(rng, plain)
    side = CANVAS - 12 if plain else int(rng.integers(54, 86))
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    margin = CANVAS - side
    corner = (margin // 2, margin // 2) if plain else tuple(int(v) for v in rng.integers(0, margin + 1, 2))
    mask.paste(Image.fromarray(strokes).resize((side, side), Image.Resampling.BICUBIC), corner)
    if not plain:
        mask = mask.rotate(float(rng.uniform(-18, 18)), Image.Resampling.BILINEAR)
    image = canvas(rng, plain, paper)
    image.paste(ink, (0, 0), mask)
    return finish(rng, image, plain)


# -------------------------------------------------------------------------------- drawn images

SHAPES = ["circle", "square", "triangle", "star"]
COLOURED_SHAPES = [f"{colour} {shape}" for colour in PALETTE for shape in SHAPES]


def _shape(rng: Generator, label: int, plain: bool) -> Image.Image:
    colour, kind = COLOURED_SHAPES[label].split()
    image = canvas(rng, plain)
    pen = ImageDraw.Draw(image)
    if not plain:
        clutter(rng, pen, 6)
    radius = rng.uniform(24, 38) if plain else rng.uniform(13, 30)
    x, y = rng.uniform(radius, CANVAS - radius, 2)
    turn = rng.uniform(-0.1, 0.1) if plain else rng.uniform(0, 2 * math.pi)
    fill = jitter(rng, PALETTE[colour], 10 if plain else 45)
    pen.polygon(outline(kind, x, y, radius, turn), fill=fill)
    if not plain:
        clutter(rng, pen, 3)
    return finish(rng, image, plain)


TEXTURES = ["stripes", "checkerboard", "dots", "waves", "static", "grid", "zigzag", "rings"]


def _texture(rng: Generator, label: int, plain: bool) -> Image.Image:
    kind = TEXTURES[label]
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float64)
    turn = 0.0 if plain else rng.uniform(0, math.pi)
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    period = rng.uniform(14, 20) if plain else rng.uniform(9, 30)
    a, b = u / period + rng.uniform(0, 1), v / period + rng.uniform(0, 1)
    triangle_wave = np.abs(2 * (b / 2 % 1) - 1)
    if kind == "stripes":
        on = a % 1 < 0.5
    elif kind == "checkerboard":
        on = (a % 1 < 0.5) ^ (b % 1 < 0.5)
    elif kind == "dots":
        on = (a % 1 - 0.5) ** 2 + (b % 1 - 0.5) ** 2 < 0.09
    elif kind == "waves":
        on = (a + 0.35 * np.sin(math.pi * b)) % 1 < 0.5
    elif kind == "static":
        cells = CANVAS // (4 if plain else int(rng.integers(3, 7))) + 1
        grain = rng.random((cells, cells)) < 0.5
        on = np.kron(grain, np.ones((CANVAS // cells + 1,) * 2, bool))[:CANVAS, :CANVAS]
    elif kind == "grid":
        on = (a % 1 < 0.2) | (b % 1 < 0.2)
    elif kind == "zigzag":
        on = (a + 0.9 * triangle_wave) % 1 < 0.5
    else:
        cx, cy = (CANVAS / 2, CANVAS / 2) if plain else rng.uniform(0, CANVAS, 2)
        on = np.hypot(x - cx, y - cy) / period % 1 < 0.5
    ink, paper = ink_and_paper(rng, plain)
    pixels = np.where(on[..., None], np.array(ink), np.array(canvas(rng, plain, paper)))
    return finish(rng, Image.fromarray(pixels.astype(np.uint8)), plain)


LETTERS = list("ABDEFGHJKMNPQRST")
TYPEFACES: dict[str, list[str]] = {  # the first font of each is the one of the plain style
    "sans": ["DejaVuSans", "cmss10"],
    "serif": ["STIXGeneral", "DejaVuSerif", "cmr10"],
    "monospace": ["DejaVuSansMono", "cmtt10"],
    "bold": ["DejaVuSans-Bold", "DejaVuSerif-Bold", "STIXGeneralBol", "cmb10"],
    "italic": ["STIXGeneralItalic", "DejaVuSerif-Italic", "DejaVuSans-Oblique", "cmti10"],
}
FONTS = [font for fonts in TYPEFACES.values() for font in fonts]


def _glyph(rng: Generator, label: int, plain: bool) -> Image.Image:
    ink, paper = ink_and_paper(rng, plain)
    image = canvas(rng, plain, paper)
    fonts = FONTS[:1] + ["DejaVuSans-Bold"] if plain else FONTS
    size = int(rng.integers(66, 78) if plain else rng.integers(34, 84))
    degrees = 0.0 if plain else float(rng.uniform(-35, 35))
    x, y = CANVAS / 2 + rng.uniform(-1, 1, 2) * (5 if plain else (CANVAS - size) / 2)
    if not plain:
        clutter(rng, ImageDraw.Draw(image), 4)
    write(image, LETTERS[label], load_font(str(rng.choice(fonts)), size), ink, (x, y), degrees)
    return finish(rng, image, plain)


def _typeface(rng: Generator, label: int, plain: bool) -> Image.Image:
    ink, paper = ink_and_paper(rng, plain)
    image = canvas(rng, plain, paper)
    fonts = TYPEFACES[list(TYPEFACES)[label]]
    name = fonts[0] if plain else str(rng.choice(fonts))
    size = int(rng.integers(28, 31) if plain else rng.integers(24, 36))
    font, degrees = load_font(name, size), 0.0 if plain else float(rng.uniform(-8, 8))
    for line in range(CANVAS // size):
        word = "".join(rng.choice(list("abdefghiklmnoprstu"), int(rng.integers(4, 7))))
        centre = (CANVAS / 2 + rng.uniform(-5, 5), size * (line + 0.6))
        write(image, word, font, ink, centre, degrees)
    return finish(rng, image, plain)


COUNTS = ["one object", *(f"{n} objects" for n in ("two", "three", "four", "five", "six"))]


def _count(rng: Generator, label: int, plain: bool) -> Image.Image:
    ink, paper = ink_and_paper(rng, plain)
    image = canvas(rng, plain, paper)
    pen = ImageDraw.Draw(image)
    kind = "circle" if plain else str(rng.choice(SHAPES))
    while True:  # draw all centres at once until no two are too close
        places = rng.uniform(13, CANVAS - 13, (label + 1, 2))
        apart = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1))
        if np.all(apart + CANVAS * np.eye(label + 1) > 25):
            break
    for x, y in places:
        radius = 11 if plain else rng.uniform(8, 12)
        turn = 0.0 if plain else rng.uniform(0, 2 * math.pi)
        pen.polygon(outline(kind, x, y, radius, turn), fill=jitter(rng, ink, 4 if plain else 20))
    return finish(rng, image, plain)


RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}


def _relation(rng: Generator, label: int, plain: bool) -> Image.Image:
    step = np.array(list(RELATIONS.values())[label], float)
    image = canvas(rng, plain)
    pen = ImageDraw.Draw(image)
    if not plain:
        clutter(rng, pen, 4)
    apart = rng.uniform(19, 22) if plain else rng.uniform(15, 26)
    slant = step[::-1] * rng.uniform(-3, 3) * (1 if plain else 3.5)
    centre = CANVAS / 2 + rng.uniform(-4, 4, 2) * (1 if plain else 2)
    for kind, side in (("circle", 1), ("square", -1)):
        x, y = centre + side * (step * apart + slant)
        colour = jitter(rng, PALETTE[str(rng.choice(list(PALETTE)))], 10 if plain else 40)
        radius = 15 if plain else rng.uniform(9, 16)
        pen.polygon(outline(kind, x, y, radius, 0 if plain else rng.uniform(-0.3, 0.3)), fill=colour)
    return finish(rng, image, plain)


RENDERED: dict[str, RenderedTask] = {
    "digits": RenderedTask(
        [str(d) for d in range(10)],
        "a scan of the handwritten digit {c}.",
        None,
        ("the handwritten number {c}.", "someone wrote the digit {c}."),
        sizes={split: 10 * count for split, count in DIGITS_PER_CLASS.items()},
    ),
    "shapes": RenderedTask(
        COLOURED_SHAPES,
        "a picture of a {c}.",
        _shape,
        ("there is a {c} in the picture.", "one {c} on a plain background."),
    ),
    "textures": RenderedTask(
        TEXTURES,
        "a pattern of {c}.",
        _texture,
        ("a texture with {c}.", "a surface covered with {c}."),
    ),
    "glyphs": RenderedTask(
        LETTERS,
        "a picture of the letter {c}.",
        _glyph,
        ("the capital letter {c}.", "a printed letter {c}."),
    ),
    "typefaces": RenderedTask(
        list(TYPEFACES),
        "words printed in {c} type.",
        _typeface,
        ("some text in a {c} font.", "two lines of {c} letters."),
    ),
    "counting": RenderedTask(
        COUNTS,
        "a picture of {c}.",
        _count,
        ("there is {c} here.", "exactly {c} on paper."),
    ),
    "relations": RenderedTask(
        list(RELATIONS),
        "the circle is {c} the square.",
        _relation,
        ("a circle {c} a square.", "a picture of a circle {c} a square."),
    ),
}
