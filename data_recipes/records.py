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
#: Which of an example's pictures are the frames of one video each: where these begin and end.
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
    """A frame that is shown of a video file.

    Attributes:
        path: the file.
        index: which one, counted from 0.
        count: how many frames are shown of the file, by the rule of `videos.sample`.
    """

    path: str
    index: int
    count: int


@dataclass
class Pictures:
    """The pictures of a source and the records that show them.

    Attributes:
        dataset: a dataset whose column `image` holds bytes or paths, undecoded: one picture per row,
            or a list of them. In a row with something in the column `frame`, where there is one, the path is
            that of a video, of which it says the `index` and `count` of a `Frame`.
        cells: where each picture lies: its row, and its position in the row's list (None without lists).
        shown: per record the pictures that it shows, as indices into `cells`; none, one or several.
        folder: where relative paths in the dataset start.
    """

    dataset: datasets.Dataset
    cells: list[tuple[int, int | None]]
    shown: list[tuple[int, ...]]
    folder: str = ""


@dataclass
class Records:
    """What a reader found, in the source's order.

    Attributes:
        ids: one per record, the same wherever the files lie.
        pictures: the pictures, unread.
        labels: the source's labels (name or index), None outside classification.
        label_names: names of integer labels, where the source has them.
        questions: one per record, or None; of a conversation the last one.
        answers: the reference answers of each record, of a conversation those to its last question; empty
            for classification.
        meta: what else a metric needs to know of each record; empty where the source says no more.
        left_out: files beside the pictures that are not read, by kind.
        histories: of each record what was said before its question; empty where nothing was.
        videos: of each record which of its pictures are one video's frames, as spans (start, end) of their
            positions; empty where none are.
    """

    ids: list[str]
    pictures: Pictures
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


def picture_files(paths: list[list[Path | Frame]]) -> Pictures:
    """Image files and frames that are read when asked for; one that several records show is one picture.

    Args:
        paths: the files, or frames of video files, of each record, in the order in which they are shown.
    """
    rows: dict[Path | Frame, int] = {}
    shown = [tuple(rows.setdefault(p, len(rows)) for p in own) for own in paths]
    files = [Path(p.path) if isinstance(p, Frame) else p for p in rows]
    frames = [{"index": p.index, "count": p.count} if isinstance(p, Frame) else None for p in rows]
    return _pictures([{"path": str(p.absolute()), "bytes": None} for p in files], shown, frames)


def picture_bytes(encoded: Iterable[bytes]) -> Pictures:
    """Return images that are given as the bytes of image files, one per record, as `Pictures`."""
    cells = [{"path": None, "bytes": b} for b in encoded]
    return _pictures(cells, [(row,) for row in range(len(cells))])


def classified(
    ids: list[str],
    pictures: Pictures,
    labels: list[Any],
    label_names: list[str] | None,
    left_out: dict[str, list[str]] | None = None,
) -> Records:
    """Return the records of a classification task; see `Records`."""
    return Records(
        ids, pictures, labels, label_names, [None] * len(ids), [[]] * len(ids), left_out=left_out or {}
    )


def _pictures(
    cells: list[dict[str, Any]],
    shown: list[tuple[int, ...]],
    frames: Sequence[dict[str, int] | None] = (),
) -> Pictures:
    import datasets  # takes over a second to import, and rendered tasks don't need it

    columns: dict[str, Any] = {"image": datasets.Image(decode=False)}
    content: dict[str, Any] = {"image": cells}
    if any(frames):
        columns["frame"] = {"index": datasets.Value("int32"), "count": datasets.Value("int32")}
        content["frame"] = frames
    dataset = datasets.Dataset.from_dict(content, features=datasets.Features(columns))
    return Pictures(dataset, [(row, None) for row in range(len(cells))], shown)
