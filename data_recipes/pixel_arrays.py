"""Pictures that a file holds as plain numbers: CIFAR's pickles and MNIST's IDX files."""

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
from .records import Records, classified, picture_bytes


def read_cifar(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """CIFAR-100's python version: a pickle per split, and `meta` with the names of the classes.

    Source of the layout: cs.toronto.edu/~kriz/cifar.html.

    Raises:
        RecipeError: a file is missing, holds something else, or would have code run.
    """
    path = split_file(recipe, split, data_root)
    meta = inside(
        set_folder(recipe, data_root), "meta", f"recipe '{recipe.name}'", data_root_of(recipe, data_root)
    )
    batch, names = unpickle(path), unpickle(meta).get("fine_label_names")
    pixels, labels = batch.get("data"), batch.get("fine_labels")
    if not isinstance(pixels, _Array) or not isinstance(labels, list) or not isinstance(names, list):
        raise RecipeError(
            f"{path} or {meta.name} beside it is none of CIFAR-100's files", "put the extracted archive there"
        )
    values = pixels.values(path)
    if values.shape != (len(labels), 3 * 32 * 32):
        raise RecipeError(
            f"{path} holds {len(labels)} labels and pixels of the shape {values.shape}",
            "put the extracted archive there",
        )
    # Stored channel by channel.
    pictures = values.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _records(split, pictures, labels, names)


def read_idx(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """MNIST's IDX files: a split is two of them, the pictures' and the labels'.

    Source of the layout: yann.lecun.com/exdb/mnist.

    Raises:
        RecipeError: the split names other than two files, one is missing, or holds something else.
    """
    files = split_files(recipe, split, data_root)
    if len(files) != 2:
        raise RecipeError(
            f"recipe '{recipe.name}' names {len(files)} files as its {split} split",
            "list two, the images' and the labels'",
        )
    pictures, labels = _idx(files[0], dimensions=3), _idx(files[1], dimensions=1)
    if len(pictures) != len(labels):
        raise RecipeError(
            f"{files[0].name} holds {len(pictures)} pictures and {files[1].name} {len(labels)} labels",
            "use the two files of one release",
        )
    return _records(split, pictures, labels.tolist(), label_names=None)


def unpickle(path: Path) -> dict[str, Any]:
    """A pickled dict of texts, numbers, lists and arrays of bytes, read without running anything.

    A pickle is a program: it may call any function of any module by its name, so that reading a stranger's
    file is the same as running it. This reader knows three names, those that numpy writes for an array, and
    gives back for each a stand-in of its own that only keeps what it is handed; every other name is refused.

    Raises:
        RecipeError: the file is missing, is no such pickle, or names anything else.
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
    # On broken bytes pickle raises nearly every kind of error.
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
    """A pickle names something that is none of an array's three names."""


class _Array:
    """What stands for numpy's array, dtype and `_reconstruct`.

    It keeps the state of an array and does nothing.
    """

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def values(self, path: Path) -> np.ndarray:
        """The array, one byte per number.

        Raises:
            RecipeError: it is of another kind.
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
    """How a newer Python writes bytes in the older protocol of these files."""
    return text.encode("latin1")


#: numpy renamed its inner module in version 2.
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
    """The bytes of an IDX file of so many dimensions."""
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
    split: str, pictures: Iterable[np.ndarray], labels: list[int], label_names: list[str] | None
) -> Records:
    """Records of pictures (height, width) or (height, width, 3), numbered."""
    # A netpbm file is its pixels behind a line of text, so that nothing is lost and no time either.
    encoded = (
        b"P%d %d %d 255\n" % (5 if p.ndim == 2 else 6, p.shape[1], p.shape[0]) + p.tobytes() for p in pictures
    )
    return classified(
        [f"{split}-{i}" for i in range(len(labels))], picture_bytes(encoded), labels, label_names
    )
