"""Where a task's pictures come from: encoded files, or the code that draws them."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from tqdm import tqdm

from .decoding import WHITE, Decoded, decode
from .file_bytes import Listings, read_file
from .records import Frame, Pictures
from .rendered import RENDERED, render
from .rendered_scenes import SCENES, draw
from .videos import read_frame

# Checking a set decodes every picture; those that fit in here are kept, so that a small set is
# decoded once for the whole run while a large one doesn't fill the memory.
KEEP_BYTES = 128 * 2**20
BATCH = 256


class Images:
    """Pictures by number, each with a SHA-256, decoded pictures kept up to `KEEP_BYTES`.

    Attributes:
        notes: by row, what its decoding did beyond a conversion to RGB, for those where it did; see
            `Decoded`.
    """

    def __init__(self) -> None:
        self.notes: dict[int, str] = {}
        self._digests: dict[int, str] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._kept: dict[int, Image.Image] = {}
        self._kept_bytes = 0

    def image(self, row: int) -> Image.Image:
        """The RGB picture in a row; the caller may change it."""
        if row in self._kept:
            return self._kept[row].copy()
        return self._decode(row)

    def digest(self, row: int) -> str:
        """Return the SHA-256 of a row's image.

        It is that of the encoded bytes, and of what decoding did beyond a conversion to RGB; where nothing is
        encoded, that of the pixels.
        """
        return self._digests[row]

    def _decode(self, row: int) -> Image.Image:
        raise NotImplementedError

    def size(self, row: int) -> tuple[int, int]:
        """(height, width) of a row's picture."""
        if row not in self._sizes:
            self.image(row)
        return self._sizes[row]

    def _keep(self, row: int, image: Image.Image) -> None:
        self._sizes[row] = (image.height, image.width)
        size = image.width * image.height * 3
        if self._kept_bytes + size <= KEEP_BYTES:
            self._kept[row] = image
            self._kept_bytes += size

    def __getstate__(self) -> dict:
        # a data loader's worker process decodes for itself rather than receive a copy of it all
        return self.__dict__ | {"_kept": {}, "_kept_bytes": 0}


class EncodedImages(Images):
    """Pictures of a source, read from their files or cells when they are asked for.

    Args:
        pictures: where they lie.
        background: `#rrggbb`, what is seen through transparent pixels.
    """

    def __init__(self, pictures: Pictures, background: str = WHITE) -> None:
        super().__init__()
        self._dataset, self._cells, self._background = pictures.dataset, pictures.cells, background
        self._folder = pictures.folder
        self._listings: Listings = {}

    def __len__(self) -> int:
        return len(self._cells)

    def check(self, label: str) -> dict[int, str]:
        """Hash and decode every picture once.

        Args:
            label: what the progress bar says.

        Returns:
            Why a picture cannot be read, for those that cannot.
        """
        bad: dict[int, str] = {}
        count = len(self)
        # Pillow and hashlib release the interpreter lock, so threads share the work; batches bound
        # the number of decoded pictures that wait
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, _bar(f"checking {label}", count) as bar:
            for start in range(0, count, BATCH):
                batch = range(start, min(start + BATCH, count))
                for row, found in zip(batch, pool.map(self._examine, batch), strict=True):
                    if isinstance(found, str):
                        bad[row] = found
                    else:
                        self._take(row, *found)
                    bar.update()
        self._listings = {}
        return bad

    def _take(self, row: int, digest: str, decoded: Decoded) -> None:
        self._digests[row] = digest
        if decoded.note:
            self.notes[row] = decoded.note
        self._keep(row, decoded.image)

    def _examine(self, row: int) -> tuple[str, Decoded] | str:
        try:
            if frame := self._frame(row):
                digest, image = read_frame(frame, self._listings)
                return digest, Decoded(image, "")
            data = self._bytes(row)
            decoded = decode(data, self._background)
            # Whatever names pixels by this (a run's fingerprints, prepared pictures) was right before where
            # there is no note, and elsewhere belongs to other pixels.
            return hashlib.sha256(data + decoded.note.encode()).hexdigest(), decoded
        # Pillow's readers raise nearly every kind of error on broken bytes; each is reported
        except Exception as error:
            return " ".join(str(error).split()) or type(error).__name__

    def _frame(self, row: int) -> Frame | None:
        """Return which frame of a video a picture is; None where it is none."""
        if "frame" not in self._dataset.column_names:
            return None
        cells = self._dataset[self._cells[row][0]]
        return Frame(cells["image"]["path"], **cells["frame"]) if cells["frame"] else None

    def _bytes(self, row: int) -> bytes:
        place, position = self._cells[row]
        cell = self._dataset[place]["image"]
        if position is not None:
            cell = cell[position]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise FileNotFoundError("no image in the record")
        if cell["bytes"] is not None:
            return cell["bytes"]
        return read_file(os.path.join(self._folder, cell["path"]), self._listings)

    def _decode(self, row: int) -> Image.Image:
        if frame := self._frame(row):
            return read_frame(frame, self._listings)[1].copy()
        return decode(self._bytes(row), self._background).image


class RenderedImages(Images):
    """Pictures of a rendered task that are drawn when they are asked for.

    Attributes:
        ids: of each picture, known without drawing it.
    """

    def __init__(self, task: str, split: str) -> None:
        super().__init__()
        self._task, self._split = task, split
        spec = SCENES[task] if task in SCENES else RENDERED[task]
        # what `render` promises; drawing hundreds of pictures to learn it would take seconds
        self.ids = [f"{task}-v{spec.version}-{split}-{row:05d}" for row in range(spec.sizes[split])]

    def digest(self, row: int) -> str:
        """Return the SHA-256 of a row's pixels."""
        if row not in self._digests:
            self._digests[row] = hashlib.sha256(self.image(row).tobytes()).hexdigest()
        return self._digests[row]

    def _decode(self, row: int) -> Image.Image:
        image = self._draw(row)
        self._keep(row, image)
        return image.copy()

    def _draw(self, row: int) -> Image.Image:
        if self._task in SCENES:
            return draw(self._task, self._split, row)
        image, _, name = render(self._task, self._split, row)
        if name != self.ids[row]:
            raise AssertionError(f"render drew {name}, not {self.ids[row]}")
        return image


def _bar(text: str, count: int) -> tqdm:
    """A progress bar that shows after two seconds, on the first process only."""
    return tqdm(total=count, desc=text, unit="image", delay=2, disable=os.environ.get("RANK", "0") != "0")
