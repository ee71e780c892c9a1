"""Readers of images that are stored as arrays of numbers: CIFAR's pickles and MNIST's IDX files."""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RecipeError
from .file_bytes import read_file
from .paths import data_root_of, describe_error, inside, set_folder, split_file, split_files
from .recipe import Recipe
from .records import Records, classified, image_bytes


def read_cifar(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read CIFAR-100's python version: a pickle per split, and `meta` with the names of the classes.

    Source of the layout: cs.toronto.edu/~kriz/cifar.html.

    Raises:
        RecipeError: a file is missing, has other content, or would run code.
    """
    path = split_file(recipe, split, data_root)
    meta = inside(
        set_folder(recipe, data_root), "meta", f"recipe '{recipe.name}'", data_root_of(recipe, data_root)
    )
    batch, names = unpickle(path), unpickle(meta).get("fine_label_names")
    pixels, labels = batch.get("data"), batch.get("fine_labels")
    if not isinstance(pixels, _Array) or not isinstance(labels, list) or not isinstance(names, list):
        raise RecipeError(
            f"{path} or {meta.name} next to it is none of CIFAR-100's files",
            "put the extracted archive there",
        )
    values = pixels.values(path)
    if values.shape != (len(labels), 3 * 32 * 32):
        raise RecipeError(
            f"{path} holds {len(labels)} labels and pixels of the shape {values.shape}",
            "put the extracted archive there",
        )
    # Stored channel by channel.
    images = values.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _records(split, images, labels, names)


def read_idx(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read MNIST's IDX files: a split has two of them, the images' and the labels'.

    Source of the layout: yann.lecun.com/exdb/mnist.

    Raises:
        RecipeError: the split does not name two files, or one is missing or has other content.
    """
    files = split_files(recipe, split, data_root)
    if len(files) != 2:
        raise RecipeError(
            f"recipe '{recipe.name}' names {len(files)} files as its {split} split",
            "list two, the images' and the labels'",
        )
    images, labels = _idx(files[0], dimensions=3), _idx(files[1], dimensions=1)
    if len(images) != len(labels):
        raise RecipeError(
            f"{files[0].name} holds {len(images)} images and {files[1].name} {len(labels)} labels",
            "use the two files of one release",
        )
    return _records(split, images, labels.tolist(), label_names=None)


def unpickle(path: Path) -> dict[str, Any]:
    """Read a pickled dict of texts, numbers, lists and arrays of bytes, without running code.

    A pickle is a program: it may call any function of any module by its name. This reader knows the names
    that numpy writes for an array, and replaces each by a class that only stores its arguments; every other
    name is refused.

    Raises:
        RecipeError: the file is missing, is no such pickle, or has another name.
    """
    try:
        content = _Reader(io.BytesIO(read_file(path)), encoding="latin1").load()
    except FileNotFoundError as error:
        raise RecipeError(f"there is no '{path}'", "put the extracted archive there") from error
    except _Refused as error:
        raise RecipeError(
            f"{path} is a pickle that would call {error}, and nothing in a data set has to be run",
            "replace it by the official file",
        ) from error
    # On damaged bytes pickle raises nearly every kind of error.
    except Exception as error:
        raise RecipeError(
            f"{path} cannot be read as a pickle ({describe_error(error)})", "replace it by the official file"
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path} holds a {type(content).__name__}, not a dict", "replace it by the official file"
        )
    return content


class _Refused(Exception):
    """A pickle names a function or class that is not in `KNOWN`."""


class _Array:
    """Replacement of numpy's array, dtype and `_reconstruct` that only stores an array's state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def values(self, path: Path) -> np.ndarray:
        """Return the array, one byte per number.

        Args:
            path: the file, for errors.

        Raises:
            RecipeError: the array has another type or layout.
        """
        try:
            _, shape, kind, by_column, data = self.state
            data = data if isinstance(data, bytes) else data.encode("latin1")  # Python 2 wrote bytes as text
            if kind.arguments[0] != "u1" or by_column:
                raise ValueError("no bytes, row by row")
            return np.frombuffer(data, np.uint8).reshape(shape)
        except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise RecipeError(
                f"{path} holds an array that is none of CIFAR's ({describe_error(error)})",
                "replace it by the official file",
            ) from error


def _encoded(text: str, encoding: str) -> bytes:
    """Return bytes from the text that Python 3 writes for them in the older protocol of these files."""
    return text.encode("latin1")


#: (module, name) in a pickle → its replacement. numpy renamed its inner module in version 2.
KNOWN = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _encoded,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise _Refused(f"{module}.{name}")
        return KNOWN[module, name]


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of bytes with `dimensions` dimensions."""
    data = read_file(path)
    head = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", data[4:head]) if len(data) >= head else ()
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != head + math.prod(shape):
        raise RecipeError(
            f"{path} is no IDX file of bytes in {dimensions} dimension{'s' * (dimensions > 1)}, or is cut "
            "off",
            "replace it by the official file, unpacked",
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def _records(
    split: str, images: Iterable[np.ndarray], labels: list[int], label_names: list[str] | None
) -> Records:
    """Return numbered records of images (height, width) or (height, width, 3)."""
    # A netpbm file is a line of text followed by the pixels, so encoding is lossless and fast.
    encoded = (
        b"P%d %d %d 255\n" % (5 if p.ndim == 2 else 6, p.shape[1], p.shape[0]) + p.tobytes() for p in images
    )
    return classified([f"{split}-{i}" for i in range(len(labels))], image_bytes(encoded), labels, label_names)
