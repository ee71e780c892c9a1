"""An image of any mode in any format is decoded to what an independent computation gives, or refused in one sentence."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from llava_keeplora_recipes.decoding import decode

SLOW = [HealthCheck.too_slow]
fuzz = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=SLOW)
LOSSLESS = {
    "PNG": ("1", "L", "LA", "RGB", "RGBA", "P", "I;16"),
    "TIFF": ("1", "L", "LA", "RGB", "RGBA", "P", "I;16", "CMYK"),
    "BMP": ("1", "L", "RGB"),
    "GIF": ("1", "L", "P"),
    "TGA": ("L", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
    "ICO": ("RGB", "RGBA"),
}
KINDS = [(form, mode) for form, modes in LOSSLESS.items() for mode in modes]
OPTIONS = {"WEBP": {"lossless": True, "exact": True}, "ICO": {"sizes": [(64, 64)]}}
CHANNELS = {"1": 1, "L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "P": 1, "I;16": 1, "CMYK": 4}


def over(colour, alpha, background) -> np.ndarray:
    """Source over an opaque page (Porter and Duff, 1984): alpha · colour + (1 − alpha) · page, all in 0 … 255."""
    share = alpha[..., None].astype(float) / 255
    return np.rint(share * colour + (1 - share) * np.array(background))


def upright(pixels, orientation) -> np.ndarray:
    """The image as it is to be seen: the first row and column of what is stored are the sides that EXIF 2.32,
    4.6.4, names: 1 top left, 2 top right, 3 bottom right, 4 bottom left, 5 left top, 6 right top, 7 right bottom,
    8 left bottom."""
    if orientation >= 5:  # rows of what is stored are columns of what is seen
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def encode(image, form, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **OPTIONS.get(form, {}), **options)
    return file.getvalue()


def noise(mode, rng, size=(6, 9)) -> np.ndarray:
    if mode == "1":
        return rng.integers(0, 2, (*size, 1)).astype(np.uint8) * 255
    if mode == "I;16":
        return rng.integers(0, 65536, (*size, 1)).astype(np.uint16)
    return rng.integers(0, 256, (*size, CHANNELS[mode])).astype(np.uint8)


def picture(mode, values, palette) -> Image.Image:
    if mode == "1":
        return Image.fromarray(values[..., 0]).convert("1", dither=Image.Dither.NONE)
    if mode == "I;16":
        return Image.fromarray(values[..., 0])
    if mode == "CMYK":
        return Image.frombytes("CMYK", values.shape[1::-1], values.tobytes())
    image = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)
    if mode == "P":
        image = Image.frombytes("P", values.shape[1::-1], values.tobytes())
        image.putpalette(palette.tobytes())
    return image


def seen(mode, values, palette, background) -> np.ndarray:
    if mode == "P":
        return palette[values[..., 0]].astype(float)
    if mode == "I;16":
        return np.repeat(np.rint(values / 257.0), 3, axis=-1)
    if mode == "CMYK":
        ink = values.astype(float)
        return (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    if mode in ("LA", "RGBA"):
        return over(values[..., :-1], values[..., -1], background)
    return np.repeat(values, 3, axis=-1)[..., :3] if values.shape[-1] == 1 else values


def agree(image, expected, by=1.0) -> None:
    got = np.asarray(image).astype(float)
    assert image.mode == "RGB" and got.shape == expected.shape and np.abs(got - expected).max() <= by


@fuzz
@given(st.sampled_from(KINDS), st.integers(0, 2**32), st.sampled_from(["#ffffff", "#000000", "#3C78f0"]))
def test_every_mode_in_every_format_is_what_a_viewer_shows(kind, seed, background):
    form, mode = kind
    rng = np.random.default_rng(seed)
    values = noise(mode, rng, (64, 64) if form == "ICO" else (6, 9))
    palette = rng.integers(0, 256, (256, 3)).astype(np.uint8)
    page = [int(background[i : i + 2], 16) for i in (1, 3, 5)]
    data = encode(picture(mode, values, palette), form)
    agree(decode(data, background).image, seen(mode, values, palette, page))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright(form, orientation):
    blocks = np.random.default_rng(orientation).integers(0, 2, (3, 5, 3)).astype(np.uint8) * 255
    stored = np.kron(blocks, np.ones((16, 16, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    image = decode(encode(Image.fromarray(stored), form, exif=exif, **options)).image
    agree(image, upright(stored, orientation).astype(float), by=6 if form in ("JPEG", "WEBP") else 1)
    assert image.getexif().get(0x0112, 1) == 1, "nobody is to turn it once more"


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_there_is_none_of_leaves_the_image_as_it_lies(value):
    pixels = noise("RGB", np.random.default_rng(0))
    exif = Image.Exif()
    exif[0x0112] = value
    decoded = decode(encode(Image.fromarray(pixels), "PNG", exif=exif.tobytes()))
    agree(decoded.image, pixels)
    assert decode(encode(Image.fromarray(pixels), "PNG", exif=b"Exif\0\0garbage")).note == decoded.note == ""


def test_a_turned_transparent_image_is_both_turned_and_laid_over_the_page():
    values = noise("RGBA", np.random.default_rng(5))
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode(encode(Image.fromarray(values), "PNG", exif=exif))
    agree(decoded.image, over(upright(values, 6)[..., :3], upright(values, 6)[..., 3], [255] * 3))
    assert decoded.note == "orientation 6, over #ffffff"


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "I;16", "GIF"])
def test_one_transparent_colour_lets_the_page_through(mode):
    form, mode = ("GIF", "P") if mode == "GIF" else ("PNG", mode)
    rng = np.random.default_rng(7)
    values, palette = noise(mode, rng), rng.integers(0, 256, (256, 3)).astype(np.uint8)
    key = values[2, 3]
    given = tuple(map(int, key)) if mode == "RGB" else int(key[0] > 0) if mode == "1" else int(key[0])
    there = (values == key).all(axis=-1)
    expected = seen(mode, values, palette, None).astype(float)
    expected[there] = (10, 20, 30)
    agree(decode(encode(picture(mode, values, palette), form, transparency=given), "#0a141e").image, expected)


def test_a_palette_with_an_alpha_per_colour_and_a_grey_of_four_bits_with_a_transparent_one():
    rng = np.random.default_rng(8)
    values, palette = noise("P", rng), rng.integers(0, 256, (256, 3)).astype(np.uint8)
    alphas = rng.integers(0, 256, 256).astype(np.uint8)
    data = encode(picture("P", values, palette), "PNG", transparency=alphas.tobytes())
    agree(decode(data).image, over(palette[values[..., 0]], alphas[values[..., 0]], [255] * 3))
    # 4 x 1 pixels of the levels 0, 5, 10, 15, of which 5 is transparent (PNG, 11.3.2.1: a number of the own depth)
    header, pixels = bytes([0, 0, 0, 4, 0, 0, 0, 1, 4, 0, 0, 0, 0]), zlib.compress(b"\x00\x05\xaf")
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"tRNS", b"\x00\x05"), (b"IDAT", pixels), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    agree(decode(data, "#010203").image, np.array([[[0] * 3, [1, 2, 3], [170] * 3, [255] * 3]]))


def test_black_drawings_on_nothing_are_black_on_white():
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:5, 3:7] = 255
    black = np.zeros((8, 8), np.uint8)
    ink = 255.0 - np.repeat(alpha[..., None], 3, axis=-1)
    agree(decode(encode(Image.fromarray(np.stack([black, alpha], -1)), "PNG")).image, ink)
    agree(decode(encode(Image.fromarray(np.stack([black] * 3 + [alpha], -1)), "PNG")).image, ink)


def test_an_opaque_image_is_what_it_was_before_and_has_no_note():
    values = noise("RGBA", np.random.default_rng(9))
    values[..., 3] = 255
    decoded = decode(encode(Image.fromarray(values), "PNG"))
    assert decoded.note == "" and np.array_equal(np.asarray(decoded.image), values[..., :3])


def test_tiffs_premultiplied_big_endian_and_white_is_zero():
    rng = np.random.default_rng(10)
    values = rng.integers(0, 65536, (4, 5)).astype(np.uint16)
    grey = np.repeat(np.rint(values / 257.0)[..., None], 3, -1)
    big = Image.frombytes("I;16B", (5, 4), values.astype(">u2").tobytes())
    agree(decode(encode(big, "TIFF")).image, grey)
    agree(decode(encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0})).image, 255 - grey)
    alpha = rng.integers(1, 256, (4, 5)).astype(np.uint8)
    colour = (rng.integers(0, 256, (4, 5, 3)) * alpha[..., None] // 255).astype(np.uint8)
    whole = Image.fromarray(np.concatenate([colour, alpha[..., None]], -1))
    for image, seen_colour in ((whole, colour), (whole.convert("LA"), None)):
        file = encode(image, "TIFF")
        # ExtraSamples (TIFF 6.0, page 77): 2 not premultiplied, 1 premultiplied
        entry = struct.pack("<HHIH", 338, 3, 1, 2)
        assert file.count(entry) == 1
        shown = decode(file.replace(entry, struct.pack("<HHIH", 338, 3, 1, 1))).image
        seen_colour = np.asarray(image)[..., :1] if seen_colour is None else seen_colour
        page = 255.0 - np.repeat(alpha[..., None], 3, -1)
        agree(shown, np.minimum(seen_colour, alpha[..., None]) + page, by=2)


def test_lab_is_shown_by_its_definition():
    colours = np.array([[(100, 0, 0), (0, 0, 0), (50, 0, 0), (60, 40, 30), (40, -20, 25)]], float)
    numbers = np.stack([colours[..., 0] * 255 / 100, colours[..., 1], colours[..., 2]], -1)
    stored = np.rint(numbers).astype(np.int16).astype(np.uint8)
    data = encode(Image.frombytes("LAB", (5, 1), stored.tobytes()), "TIFF")
    # CIE 1976 L*a*b* with the white point D50 to XYZ, by Bradford's matrix to D65's sRGB (IEC 61966-2-1)
    y = (colours[..., 0] + 16) / 116
    f = np.stack([y + colours[..., 1] / 500, y, y - colours[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2) * np.array([0.9642, 1.0, 0.8249])
    to_rgb = np.array(
        [
            [3.1338561, -1.6168667, -0.4906146],
            [-0.9787684, 1.9161415, 0.0334540],
            [0.0719453, -0.2289914, 1.4052427],
        ]
    )
    linear = np.clip(xyz @ to_rgb.T, 0, 1)
    expected = 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    agree(decode(data).image, expected, by=4)


def test_the_first_image_of_an_animation_and_of_a_file_of_several_is_shown():
    blocks = [noise("RGB", np.random.default_rng(i), (8, 8)) for i in range(3)]
    frames = [Image.fromarray(pixels.repeat(4, 0).repeat(4, 1)) for pixels in blocks]
    for form in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        options = {"lossless": True} if form == "WEBP" else {"quality": 100} if form == "MPO" else {}
        file = io.BytesIO()
        frames[0].save(file, form, save_all=True, append_images=frames[1:], **options)
        with Image.open(io.BytesIO(file.getvalue())) as image:
            assert image.n_frames == 3
        difference = np.abs(
            np.asarray(decode(file.getvalue()).image).astype(float) - np.asarray(frames[0])
        ).mean()
        assert difference < (20 if form in ("GIF", "MPO") else 0.5), form


def test_jpegs_of_four_inks_are_not_shown_inverted():
    values = np.repeat(np.repeat(noise("CMYK", np.random.default_rng(4), (3, 3)), 8, 0), 8, 1)
    data = encode(picture("CMYK", values, None), "JPEG", quality=100, subsampling=0)
    agree(decode(data).image, seen("CMYK", values, None, None), by=6)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_of_32_bits_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode {mode}.*no agreed white: save it with 8 or 16 bits"):
        decode(encode(Image.fromarray(np.ones((3, 3), np.int32 if mode == "I" else np.float32)), "TIFF"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "TGA"])
def test_a_file_cut_off_anywhere_is_refused_or_whole(form, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as another library may leave it
    data = encode(Image.fromarray(noise("RGB", np.random.default_rng(2), (16, 16))), form)
    whole, refused = decode(data).image.tobytes(), 0
    for end in range(0, len(data), max(1, len(data) // 40)):
        try:
            assert decode(data[:end]).image.tobytes() == whole, end
        except AssertionError:
            raise
        except Exception as error:
            assert " at 0x" not in str(error)
            refused += 1
    assert refused >= 35


@fuzz
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO"]), st.data())
def test_damaged_files_are_images_or_refused(form, data):
    side = 64 if form == "ICO" else 16  # an icon of another size than its options' is not written
    whole = bytearray(encode(Image.fromarray(noise("RGB", np.random.default_rng(2), (side, side))), form))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode(bytes(whole)).image.mode == "RGB"
    except AssertionError:
        raise
    except Exception as error:
        assert " at 0x" not in str(error)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "the file is empty"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\0\0\0\x18ftypisom", "a video"),
        (b"just text", "in no format that is read"),
        (b"P6 0 5 255\n", "^(?!.*0x).*"),
    ],
)
def test_what_is_no_image_is_named(data, what):
    with pytest.raises(ValueError, match=what):
        decode(data)


def test_images_too_large_or_too_thin_to_use_are_refused_and_thin_ones_read():
    def header(width, height):
        return encode(Image.new("1", (width, height)), "PNG")

    bomb = bytearray(header(1, 1))
    for size in ((14_000, 14_000), (2**31 - 1, 2**31 - 1)):
        bomb[16:24] = struct.pack(">II", *size)
        bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
        with pytest.raises(ValueError, match="more than 178956970"):
            decode(bytes(bomb))
    for size in ((1, 1001), (1001, 1)):
        with pytest.raises(ValueError, match="a side over 1000 times the other"):
            decode(header(*size))
    for size in ((1, 1), (1, 1000), (900, 1), (3, 50)):
        assert decode(header(*size)).image.size == size


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_where_pillow_reads_it():
    values = noise("RGB", np.random.default_rng(3), (16, 16)) // 64 * 64
    assert decode(encode(Image.fromarray(values), "AVIF", quality=100)).image.size == (16, 16)
