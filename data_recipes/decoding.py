"""Decoding of image files to the RGB pixels that an image viewer shows, for all readers."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

#: The background of transparent pixels, unless a recipe sets one: that of a web page.
WHITE = "#ffffff"

#: Formats that Pillow opens without decoding their pixels: PostScript is a program that another program would
#: have to run, WMF is rendered by Windows, and of the others only the header is read.
NOT_DECODED = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})

#: Most pixels of an image: Pillow's default, for 512 MiB of pixels. Pillow's own limit is a setting that any
#: library may change.
MAX_PIXELS = 178_956_970
#: Largest ratio of an image's sides: models scale the shorter side to a few hundred pixels, and the longer
#: with it.
MAX_RATIO = 1000

ORIENTATION = 0x0112
#: EXIF orientation → the operation that turns the stored image upright (CIPA DC-008, 4.6.4, tag 274).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0

#: Kinds of files that are no image that can be read: a pattern at their start, and words for them.
CONTENTS = [
    (rb"(\xef\xbb\xbf)?\s*(<\?xml.{0,1000})?(<!--.*?-->\s*)*(<!DOCTYPE svg.{0,1000})?<svg", "an SVG drawing"),
    (rb"(\xef\xbb\xbf)?\s*(<!DOCTYPE html|<html|<head|<body)", "a web page, as a failed download leaves it"),
    (rb"version https://git-lfs", "a pointer of Git LFS, which `git lfs pull` replaces by the file"),
    (rb".{4}ftyp(hei|hev|mif1|msf1)", "a HEIC image"),
    (rb".{4}ftypavi", "an AVIF image that is damaged, or that this Pillow doesn't read"),
    (rb".{4}ftyp|RIFF.{4}AVI |\x1aE\xdf\xa3", "a video"),
    (rb"\x00\x00\x00\x0cJXL |\xff\x0a", "a JPEG XL image"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript, which is a program"),
    (rb"%PDF", "a PDF"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "a packed archive"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\x00|MM\x00\*|RIFF.{4}WEBP", "an image whose header is damaged"),
]


@dataclass(frozen=True)
class Decoded:
    """An image as a viewer shows it.

    Attributes:
        image: the image, RGB.
        note: operations other than Pillow's conversion to RGB, such as `orientation 6, over #ffffff`; empty
            for most images, which are upright and without transparency.
    """

    image: Image.Image
    note: str


def decode(data: bytes, background: str = WHITE) -> Decoded:
    """Decode an image; of several in one file, the first.

    Transparent pixels are blended with the background, EXIF orientation is applied, and grey of 16 bits is
    scaled to 8.

    Args:
        data: the content of the file.
        background: `#rrggbb`.

    Raises:
        ValueError: the bytes are no image, or one without a defined appearance: pixels of 32 bits have no
            agreed white.
        Exception: any error of Pillow for bytes that are damaged or cut off.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a setting of the process: another library may have turned it on
    with _opened(data) as image:
        _check_size(*image.size)
        image.load()  # opening reads the header only; this fails for a file that is cut off
        orientation = _orientation(image)
        rgb, alpha = _pixels(image, data)
    notes = []
    if orientation in TURNS:
        notes.append(f"orientation {orientation}")
        rgb, alpha = rgb.transpose(TURNS[orientation]), alpha and alpha.transpose(TURNS[orientation])
    if alpha is not None and alpha.getextrema()[0] < 255:
        notes.append(f"over {background.lower()}")
        blended = Image.new("RGB", rgb.size, background)
        blended.paste(rgb, mask=alpha)
        rgb = blended
    rgb.info = {}  # so that no later code applies the orientation once more
    return Decoded(rgb, ", ".join(notes))


def endings() -> frozenset[str]:
    """Return the suffixes of files that can be read, in lower case with their dot."""
    formats = Image.registered_extensions()  # it loads every plugin
    return frozenset(ending for ending, form in formats.items() if form in {*Image.OPEN, "MPO"} - NOT_DECODED)


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    Image.init()
    try:
        return Image.open(io.BytesIO(data), formats=[form for form in Image.ID if form not in NOT_DECODED])
    except UnidentifiedImageError:
        # Pillow's own message has the address of an object in it.
        flags, start = re.DOTALL | re.IGNORECASE, data[:4096]
        content = next(
            (words for pattern, words in CONTENTS if re.match(pattern, start, flags)),
            "in no format that is read",
        )
        raise ValueError(f"cannot identify image file: it is {content}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than {MAX_PIXELS} pixels") from None


def _check_size(width: int, height: int) -> None:
    if not width or not height:
        raise ValueError(f"it has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, which is more than {MAX_PIXELS}")
    if max(width, height) > MAX_RATIO * min(width, height):
        what = f"a side over {MAX_RATIO} times the other"
        raise ValueError(f"it has {width} x {height} pixels, and {what} cannot be scaled")


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION)
    # Damaged EXIF raises nearly every kind of error, and viewers ignore it.
    except Exception:
        return None


def _pixels(image: Image.Image, data: bytes) -> tuple[Image.Image, Image.Image | None]:
    """Return an image's pixels as stored, in RGB, and its opacity (mode L); None if all pixels are opaque."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if deep:
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        what = f"pixels of 32 bits (mode {image.mode})"
        raise ValueError(f"{what} have no agreed white: save it with 8 or 16 bits")
    key = image.info.get("transparency")
    if image.mode in ("L", "RGB", "1") and key is not None:
        return image.convert("RGB"), _keyed(image, key, data)
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    return rgba.convert("RGB"), rgba.getchannel("A")


def _from_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    values, limit = np.asarray(image).astype(np.int64), 65535
    tags = getattr(image, "tag_v2", {})
    if tags:
        limit = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = limit - values
    grey = np.clip((values * 255 + limit // 2) // limit, 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB"), alpha


def _keyed(image: Image.Image, key: int | tuple[int, int, int], data: bytes) -> Image.Image:
    """Return the opacity of an image in which one colour is transparent (PNG's tRNS, GIF)."""
    depth = data[24] if image.format == "PNG" else 8
    if depth == 16:
        raise ValueError("one of its colours of 16 bits is transparent, and colours are read with 8")
    if image.mode == "RGB":
        transparent = (np.asarray(image) == np.array(key)).all(axis=-1)
        return Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8))
    # Pillow scales grey of 2 and 4 bits to 0 … 255, but not the transparent colour's number.
    level = key * 255 // (2**depth - 1) if image.mode == "L" and depth < 8 else key
    return image.convert("L").point([0 if value == level else 255 for value in range(256)])
