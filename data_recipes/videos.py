"""Videos as frames: the choice of a video's frames, and decoding of them from its file by PyAV."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from PIL import Image

from .errors import RecipeError
from .file_bytes import Listings, read_file
from .records import Frame

#: Key of a frame's `info` as an image: its time in the video and the video's length, in seconds.
FRAME_TIME = "frame_time"
#: A file is decoded once for all its frames, by one thread at a time; PyAV's own threads share the work.
_DECODING = threading.Lock()


def sample(count: int, frames: int) -> list[int]:
    """Return the positions of `frames` of `count` frames, evenly spaced from the first to the last.

    The i-th is the integer part of i (count - 1) / (frames - 1), as in numpy's `linspace` with `dtype=int`;
    a single one is the first. If a video has fewer frames, some are repeated.
    """
    return [i * (count - 1) // max(frames - 1, 1) for i in range(frames)]


def refuse_without_decoder(name: str, what: str) -> None:
    """Check that video files can be decoded.

    Args:
        name: the video's file, for the error.
        what: its record, for the error.

    Raises:
        RecipeError: PyAV is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise RecipeError(
            f"{what} has the video file '{name}', and reading it needs PyAV, which is not installed",
            "install it (pip install av), or list files of frames as 'video'",
        )


def read_frame(frame: Frame, listings: Listings) -> tuple[str, Image.Image]:
    """Return the SHA-256 of a frame's video file and position, and its RGB image.

    The image is cached: don't change it.

    Raises:
        OSError: the file is missing, or cannot be read.
        ValueError: it has no video, or PyAV cannot decode it.
    """
    with _DECODING:
        try:
            status = os.stat(frame.path)
            digest, images = _decoded(frame.path, frame.count, status.st_size, status.st_mtime_ns)
        except OSError:
            read_file(frame.path, listings)  # raises with the likely cause
            raise
    name = f"{digest} frame {frame.index} of {frame.count}"
    return hashlib.sha256(name.encode()).hexdigest(), images[frame.index]


@lru_cache(maxsize=2)
def _decoded(path: str, count: int, _size: int, _changed: int) -> tuple[str, list[Image.Image]]:
    """Return the SHA-256 of a file, and `count` of its frames.

    Size and time of the last change are part of the cache's key, so that a changed file is decoded again.

    Raises:
        ValueError: PyAV cannot decode the file; its errors are of several types.
    """
    data = read_file(path)
    try:
        return hashlib.sha256(data).hexdigest(), decode_frames(data, count)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"'{path}': {reason}") from error


def decode_frames(data: bytes, count: int) -> list[Image.Image]:
    """Return `count` frames of a video, as `sample` chooses them, with their times; see `frame_time`.

    The number of frames is first taken as the number of packets; if decoding gives another number, the file
    is decoded once more with that.

    Args:
        data: the file's bytes.
        count: number of frames.

    Raises:
        Exception: whatever PyAV raises, or ValueError if there is no video in it.
    """
    total = sum(1 for _ in _packets(data))
    for _ in range(2):
        wanted, images, times = set(sample(total, count)), {}, []
        for position, frame in enumerate(_frames(data)):
            times.append(frame.time)
            if position in wanted:
                images[position] = _upright(frame)
        seen = len(times)
        if seen and seen == total:
            _note_times(images, times)
            return [images[position] for position in sample(total, count)]
        total = seen
    raise ValueError(
        "decoding gives another number of frames each time" if total else "no frame of it can be decoded"
    )


def frame_time(image: Image.Image) -> tuple[float, float] | None:
    """Return a frame's time in its video and the video's length, in seconds; None where they are not known.

    They are known of the frames of a video file, by the times that it shows them at.
    """
    return image.info.get(FRAME_TIME)


def _note_times(images: dict[int, Image.Image], times: list[float | None]) -> None:
    """Note the times of frames on their images, counted from the first frame on.

    Args:
        images: position among the video's frames → image.
        times: when each frame is shown, in seconds; nothing is noted if one is missing, or they don't rise.
    """
    known = [time for time in times if time is not None]
    if len(known) < len(times) or len(times) < 2 or known[-1] <= known[0]:
        return
    # The last frame is shown as long as the others on average.
    length = (known[-1] - known[0]) * len(known) / (len(known) - 1)
    for position, image in images.items():
        image.info[FRAME_TIME] = (known[position] - known[0], length)


def _packets(data: bytes) -> Iterator[object]:
    import av

    with av.open(io.BytesIO(data)) as container:
        if not container.streams.video:
            raise ValueError("there is no video in the file")
        yield from (packet for packet in container.demux(video=0) if packet.size)


def _frames(data: bytes) -> Iterator[Any]:
    import av

    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_type = "AUTO"
        yield from container.decode(video=0)


def _upright(frame) -> Image.Image:
    """Return a frame as RGB, rotated as players do (`rotation` is in degrees, counterclockwise)."""
    image = frame.to_image()
    angle = round(frame.rotation) % 360
    turn = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    return image.transpose(turn[angle]) if angle in turn else image
