"""Stores of a task's images: encoded files, or images that are rendered when needed."""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from PIL import Image
from tqdm import tqdm

from .decoding import WHITE, Decoded, decode
from .file_bytes import Listings, read_file
from .records import Frame, SourceImages
from .rendered import RENDERED, render
from .rendered_scenes import SCENES, draw
from .videos import FRAME_TIME, frame_time, read_frame

#: Bytes of decoded images that are kept: checking a data set decodes every image, and a small set then needs
#: no second decoding, while a large one doesn't fill the memory.
KEEP_BYTES = 128 * 2**20
BATCH = 256
#: Images that are examined before it is known how long one takes.
FIRST = 32
#: Seconds of an image below which one thread is quicker than several, which hand the interpreter lock to and
#: fro: JPEGs of 128 x 128 pixels take 0.30 ms with one and 0.33 ms with two, of 224 x 224 0.53 and 0.39 ms.
QUICK = 0.5e-3


class Images:
    """Images by number, each with a SHA-256; decoded images are kept up to `KEEP_BYTES`.

    Attributes:
        notes: row → the note of its decoding, where there is one; see `Decoded`.
    """

    def __init__(self) -> None:
        self.notes: dict[int, str] = {}
        self._digests: dict[int, str] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._times: dict[int, tuple[float, float] | None] = {}
        self._kept: dict[int, Image.Image] = {}
        self._kept_bytes = 0

    def image(self, row: int) -> Image.Image:
        """Return the RGB image of a row; the caller may change it."""
        if row in self._kept:
            return self._kept[row].copy()
        return self._decode(row)

    def digest(self, row: int) -> str:
        """Return the SHA-256 of a row's image.

        It is the hash of the encoded bytes and the note of decoding, or of the pixels if nothing is encoded.
        """
        return self._digests[row]

    def _decode(self, row: int) -> Image.Image:
        raise NotImplementedError

    def size(self, row: int) -> tuple[int, int]:
        """Return (height, width) of a row's image."""
        if row not in self._sizes:
            self.image(row)
        return self._sizes[row]

    def time(self, row: int) -> tuple[float, float] | None:
        """Return the time of a row's image in its video, and the video's length; see `videos.frame_time`."""
        if row not in self._times:
            self.image(row)
        return self._times[row]

    def stored_bytes(self, row: int) -> int:
        """Return how many bytes the image takes as it is stored; its pixels' where it is not stored alone."""
        height, width = self.size(row)
        return 3 * height * width

    def _keep(self, row: int, image: Image.Image) -> None:
        self._sizes[row] = (image.height, image.width)
        self._times[row] = frame_time(image)
        size = image.width * image.height * 3
        if self._kept_bytes + size <= KEEP_BYTES:
            self._kept[row] = image
            self._kept_bytes += size

    def __getstate__(self) -> dict:
        # A data loader's worker decodes images itself instead of receiving a copy of all of them.
        return self.__dict__ | {"_kept": {}, "_kept_bytes": 0}


class EncodedImages(Images):
    """Images of a source, read from their files or cells when they are needed.

    Args:
        images: the images' files or cells.
        background: `#rrggbb`, the background of transparent pixels.
    """

    def __init__(self, images: SourceImages, background: str = WHITE) -> None:
        super().__init__()
        self._dataset, self._cells, self._background = images.dataset, images.cells, background
        self._folder = images.folder
        self._listings: Listings = {}

    def __len__(self) -> int:
        return len(self._cells)

    def check(self, label: str) -> dict[int, str]:
        """Hash and decode every image once.

        Args:
            label: label of the progress bar.

        Returns:
            row → why its image cannot be read, for those that cannot.
        """
        bad: dict[int, str] = {}
        count = len(self)
        # Pillow and hashlib release the interpreter lock, so threads share the work; batches bound the number
        # of decoded images in memory.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, _bar(f"checking {label}", count) as bar:
            quick, began = True, 0.0
            for start, end in pairwise([0, *range(FIRST, count, BATCH), count]):
                rows = range(start, end)
                results = (map if quick else pool.map)(self._examine, rows)
                for row, result in zip(rows, results, strict=True):
                    if isinstance(result, str):
                        bad[row] = result
                    else:
                        self._take(row, *result)
                    bar.update()
                    began = began or time.perf_counter()  # The first image loads its format's reader.
                if start == 0:
                    quick = time.perf_counter() - began <= QUICK * end
        self._listings = {}
        return bad

    def _take(self, row: int, digest: str, decoded: Decoded) -> None:
        self._digests[row] = digest
        if decoded.note:
            self.notes[row] = decoded.note
        self._keep(row, decoded.image)

    def _examine(self, row: int) -> tuple[str, Decoded] | str:
        try:
            if frame := self.frame(row):
                digest, image = read_frame(frame, self._listings)
                return digest, Decoded(image, "")
            data = self._bytes(row)
            decoded, time = decode(data, self._background), self._listed_time(row)
            # Without a note this is the hash of earlier versions, whose fingerprints and caches stay valid;
            # with one, earlier versions decoded to other pixels.
            digest = hashlib.sha256(data + decoded.note.encode()).hexdigest()
            if time is not None:
                decoded.image.info[FRAME_TIME] = time
                digest = hashlib.sha256(f"{digest} at {time[0]} of {time[1]}".encode()).hexdigest()
            return digest, decoded
        # Pillow's readers raise nearly every kind of error on damaged bytes; each is reported.
        except Exception as error:
            return " ".join(str(error).split()) or type(error).__name__

    def frame(self, row: int) -> Frame | None:
        """Return which frame of a video an image is; None where it is none."""
        if "frame" not in self._dataset.column_names:
            return None
        cells = self._dataset[self._cells[row][0]]
        return Frame(cells["image"]["path"], **cells["frame"]) if cells["frame"] else None

    def _listed_time(self, row: int) -> tuple[float, float] | None:
        """Return the time that a recipe gives a frame of a list, and the video's length, in seconds."""
        if "time" not in self._dataset.column_names:
            return None
        time = self._dataset[self._cells[row][0]]["time"]
        return (time["time"], time["length"]) if time else None

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

    def stored_bytes(self, row: int) -> int:
        """Return the length of the encoded image; of a video's frame, the bytes of its pixels."""
        return super().stored_bytes(row) if self.frame(row) else len(self._bytes(row))

    def _decode(self, row: int) -> Image.Image:
        if frame := self.frame(row):
            return read_frame(frame, self._listings)[1].copy()
        image = decode(self._bytes(row), self._background).image
        if (time := self._listed_time(row)) is not None:
            image.info[FRAME_TIME] = time
        return image


class RenderedImages(Images):
    """Images of a rendered task, which are drawn when they are needed.

    Attributes:
        ids: the id of each image, known without drawing it.
    """

    def __init__(self, task: str, split: str) -> None:
        super().__init__()
        self._task, self._split = task, split
        spec = SCENES[task] if task in SCENES else RENDERED[task]
        # The ids that `render` returns; drawing hundreds of images to learn them would take seconds.
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
    """Return a progress bar that appears after two seconds, on the first process only."""
    return tqdm(total=count, desc=text, unit="image", delay=2, disable=os.environ.get("RANK", "0") != "0")
