"""Drawing functions of the rendered tasks: seeded generators, colours, backgrounds, shapes and words.

Every function that draws takes a generator, and whether the style is plain: a clean background, exact colours
and little jitter. The other style has gradients, clutter and noise.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

SIDE = 48
#: Share of plain images by split. After pre-training, half of the images have the other style, so that there
#: is something to learn, and half the plain one, so that the zero-shot score is above chance.
PLAIN_SHARE = {"pretrain": 0.8, "train": 0.5, "test": 0.5}
CANVAS = 2 * SIDE  # images are drawn at twice their size and averaged down, for smooth edges

Colour = tuple[int, int, int]


def generator(*key: object) -> Generator:
    """Return a random generator that is seeded with a SHA-256 of the key, the same on every machine."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


PALETTE: dict[str, Colour] = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 215),
    "yellow": (240, 200, 30),
}


def jitter(rng: Generator, colour: Colour, amount: int) -> Colour:
    """Return a colour each of whose channels differs by at most `amount`."""
    r, g, b = np.clip(np.array(colour) + rng.integers(-amount, amount + 1, 3), 0, 255)
    return int(r), int(g), int(b)


def ink_and_paper(rng: Generator, plain: bool) -> tuple[Colour, Colour]:
    """Return two colours of clearly different brightness; near black and near white if plain."""
    if plain:
        return jitter(rng, (25, 25, 25), 20), jitter(rng, (235, 235, 235), 15)
    dark, light = jitter(rng, (65, 65, 65), 60), jitter(rng, (190, 190, 190), 60)
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def canvas(rng: Generator, plain: bool, paper: Colour | None = None) -> Image.Image:
    """Return a background: one light colour if plain, else a gradient between two colours."""
    first = paper or jitter(rng, (232, 232, 232) if plain else (150, 150, 150), 12 if plain else 60)
    if plain:
        return Image.new("RGB", (CANVAS, CANVAS), first)
    second = np.array(jitter(rng, first, 35), float)
    ramp = np.linspace(0, 1, CANVAS)[:, None, None] * np.ones((1, CANVAS, 1))
    if rng.random() < 0.5:
        ramp = ramp.transpose(1, 0, 2)
    pixels = np.array(first) * (1 - ramp) + second * ramp
    return Image.fromarray(pixels.astype(np.uint8))


def finish(rng: Generator, image: Image.Image, plain: bool) -> Image.Image:
    """Average down to the final size and add sensor noise."""
    small = np.asarray(image.reduce(image.width // SIDE), np.float64)
    noise = rng.normal(0, 3 if plain else rng.uniform(4, 16), small.shape)
    return Image.fromarray(np.clip(small + noise, 0, 255).astype(np.uint8))


def outline(kind: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """Return the corners of a shape around (x, y), turned clockwise by `turn` radians."""
    corners, inner = {"circle": (32, 1.0), "square": (4, 1.0), "triangle": (3, 1.0), "star": (10, 0.42)}[kind]
    start = turn - math.pi / 2 + (math.pi / 4 if kind == "square" else 0)
    points = []
    for i in range(corners):
        reach = radius * (inner if i % 2 and kind == "star" else 1.0)
        angle = start + 2 * math.pi * i / corners
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return points


def clutter(rng: Generator, pen: ImageDraw.ImageDraw, pieces: int) -> None:
    """Draw grey lines and specks as distractors."""
    for _ in range(pieces):
        x, y, dx, dy = rng.uniform(0, CANVAS), rng.uniform(0, CANVAS), *rng.normal(0, 22, 2)
        level = int(rng.integers(60, 200))
        pen.line((x, y, x + dx, y + dy), fill=(level, level, level), width=int(rng.integers(1, 4)))


@cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load one of the fonts that come with matplotlib."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def write(
    image: Image.Image,
    words: str,
    font: ImageFont.FreeTypeFont,
    ink: Colour,
    centre: tuple[float, float],
    degrees: float = 0.0,
) -> None:
    """Write words around a point, turned by some degrees."""
    mask = Image.new("L", image.size, 0)
    left, top, right, bottom = font.getbbox(words)
    corner = (centre[0] - (left + right) / 2, centre[1] - (top + bottom) / 2)
    ImageDraw.Draw(mask).text(corner, words, fill=255, font=font)
    if degrees:
        mask = mask.rotate(degrees, Image.Resampling.BILINEAR, center=centre)
    image.paste(ink, (0, 0), mask)
