"""The records that every reader returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Message:
    """A turn before an example's question.

    Attributes:
        role: `system`, `user` or `assistant`.
        text: the text; a question has a marker for each image that has a place in it.
    """

    role: str
    text: str


#: Turns before an example's question: at most one system message, then questions and their answers.
History = tuple[Message, ...]
#: For each video of an example, the positions (start, end) of its frames among the example's images.
Spans = tuple[tuple[int, int], ...]


def replace_questions(history: History, questions: Iterable[str]) -> History:
    """Return a history with its questions replaced by others, in order."""
    texts = iter(questions)
    return tuple(Message("user", next(texts)) if m.role == "user" else m for m in history)


def is_history(value: Any) -> bool:
    """Return whether a value is a valid `History`: messages in the right order."""
    if not isinstance(value, tuple) or not all(isinstance(message, Message) for message in value):
        return False
    roles = [message.role for message in value]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return turns == ["user", "assistant"] * (len(turns) // 2)


@dataclass(frozen=True)
class Frame:
    """A frame of a video file.

    Attributes:
        path: the file.
        index: number of the frame among those that are used, counted from 0.
        count: number of frames that are used of the file, chosen by the rule of `videos.sample`.
    """

    path: str
    index: int
    count: int


@dataclass(frozen=True)
class ListedFrame:
    """A frame of a video that is given as the list of its frames' files.

    Attributes:
        path: the file.
        time: the frame's time in the video, in seconds.
        length: the video's length, in seconds.
    """

    path: Path
    time: float
    length: float


@dataclass
class SourceImages:
    """The images of a source, and which of them each record has.

    Attributes:
        dataset: a dataset whose column `image` has bytes or paths, undecoded: one image per row, or a list of
            them. In a row with a value in the optional column `frame`, the path is that of a video, and the
            value has the `index` and `count` of a `Frame`; the optional column `time` has the `time` and
            `length` of a `ListedFrame`.
        cells: position of each image: its row, and its position in the row's list (None without lists).
        shown: images of each record, as indices into `cells`; none, one or several.
        folder: folder to which relative paths in the dataset refer.
    """

    dataset: datasets.Dataset
    cells: list[tuple[int, int | None]]
    shown: list[tuple[int, ...]]
    folder: str = ""


@dataclass
class Records:
    """The records of a source, in its order.

    Attributes:
        ids: one per record, independent of the folder of the files.
        images: the images, not read yet.
        labels: the source's label (name or index) of each record; None outside classification.
        label_names: names of integer labels; None if the source has none.
        questions: one per record, or None; of a conversation, the last question.
        answers: reference answers of each record; of a conversation, those to its last question; empty for
            classification.
        meta: other inputs of a metric for each record; empty if there are none.
        left_out: files next to the images that are not read, by kind.
        histories: turns before each record's question; empty if there are none.
        videos: spans (start, end) of the positions of each video's frames among the record's images; empty if
            there are none.
    """

    ids: list[str]
    images: SourceImages
    labels: list[Any]
    label_names: list[str] | None
    questions: list[str | None]
    answers: list[list[str]]
    meta: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    histories: list[History] = field(default_factory=list)
    videos: list[Spans] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.meta = self.meta or [{} for _ in self.ids]
        self.histories = self.histories or [() for _ in self.ids]
        self.videos = self.videos or [() for _ in self.ids]


def image_files(paths: list[list[Path | Frame | ListedFrame]]) -> SourceImages:
    """Return image files and frames as `SourceImages`, which are read on access.

    An image that several records have is one image of the result.

    Args:
        paths: each record's image files, or frames of videos, in order.
    """
    rows: dict[Path | Frame | ListedFrame, int] = {}
    indices = [tuple(rows.setdefault(p, len(rows)) for p in record_paths) for record_paths in paths]
    files = [p if isinstance(p, Path) else Path(p.path) for p in rows]
    frames = [{"index": p.index, "count": p.count} if isinstance(p, Frame) else None for p in rows]
    times = [{"time": p.time, "length": p.length} if isinstance(p, ListedFrame) else None for p in rows]
    return _source_images([{"path": str(p.absolute()), "bytes": None} for p in files], indices, frames, times)


def image_bytes(encoded: Iterable[bytes]) -> SourceImages:
    """Return images that are given as the bytes of image files, one per record, as `SourceImages`."""
    cells = [{"path": None, "bytes": b} for b in encoded]
    return _source_images(cells, [(row,) for row in range(len(cells))])


def classified(
    ids: list[str],
    images: SourceImages,
    labels: list[Any],
    label_names: list[str] | None,
    left_out: dict[str, list[str]] | None = None,
) -> Records:
    """Return the records of a classification task; see `Records`."""
    return Records(
        ids, images, labels, label_names, [None] * len(ids), [[]] * len(ids), left_out=left_out or {}
    )


def _source_images(
    cells: list[dict[str, Any]],
    shown: list[tuple[int, ...]],
    frames: Sequence[dict[str, int] | None] = (),
    times: Sequence[dict[str, float] | None] = (),
) -> SourceImages:
    import datasets  # takes over a second to import, and rendered tasks don't need it

    columns: dict[str, Any] = {"image": datasets.Image(decode=False)}
    content: dict[str, Any] = {"image": cells}
    if any(frames):
        columns["frame"] = {"index": datasets.Value("int32"), "count": datasets.Value("int32")}
        content["frame"] = frames
    if any(times):
        columns["time"] = {"time": datasets.Value("float64"), "length": datasets.Value("float64")}
        content["time"] = times
    dataset = datasets.Dataset.from_dict(content, features=datasets.Features(columns))
    return SourceImages(dataset, [(row, None) for row in range(len(cells))], shown)
