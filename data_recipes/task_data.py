"""The examples of one split of a task, with lazily decoded images and a fingerprint."""

from __future__ import annotations

import hashlib
import json
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from PIL import Image

from .errors import RecipeError
from .images import Images
from .placeholders import MARKER, foreign_marker, place_in_turns
from .recipe import Recipe
from .records import History, Spans, replace_questions


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        id: unique within the split, independent of the folder of the data.
        images: the images in order, RGB; classification has exactly one.
        question: the question, for captioning the instruction; None for classification. Of a conversation,
            the last question.
        answers: the reference answers, of which training uses the most frequent; for classification the class
            name, as in `recipe.classes`; for captioning all captions, each of them used in training.
        label: index into `recipe.classes`; None outside classification.
        meta: other inputs of the metric, for example the kind of question.
        history: turns before the question: at most one system message, then questions and answers in turn.
            Markers in its questions are places of images, as in `question`.
        videos: spans (start, end) of the positions of each video's frames among the images.
    """

    id: str
    images: list[Image.Image]
    question: str | None
    answers: list[str]
    label: int | None
    meta: dict[str, Any] = field(default_factory=dict)
    history: History = ()
    videos: Spans = ()

    @property
    def image(self) -> Image.Image:
        """The example's only image.

        Raises:
            RecipeError: there is none, or there are several.
        """
        if len(self.images) != 1:
            raise RecipeError(
                f"example '{self.id}' has {len(self.images)} images, and one is asked for",
                "use a task with one image per example, or read 'images'",
            )
        return self.images[0]


@dataclass(frozen=True)
class Row:
    """An example with the rows of its images in the store instead of the images."""

    id: str
    question: str | None
    answers: tuple[str, ...]
    label: int | None
    images: tuple[int, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    history: History = ()
    videos: Spans = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of the example, in order."""
        return *(m.text for m in self.history), self.question or "", *self.answers


def turns_of(row: Row) -> list[Row]:
    """Return an example for each answer of a conversation, with the true turns before it.

    The first keeps the id, the others add their number to it: `a`, `a#2`, `a#3`. Each has the images that are
    marked up to its question, or all of them if none is marked.
    """
    ends = [i for i, message in enumerate(row.history) if message.role == "user"]
    answers = [(row.history[i + 1].text,) for i in ends] + [row.answers]
    questions = [row.history[i].text for i in ends] + [row.question or ""]
    marked = any(MARKER in text for text in questions)
    rows = []
    for number, (answer, end) in enumerate(zip(answers, [*ends, len(row.history)], strict=True), start=1):
        asked = questions[:number]
        image_count = sum(text.count(MARKER) for text in asked) if marked else len(row.images)
        *earlier, question = place_in_turns(asked, image_count, f"'{row.id}'")
        rows.append(
            replace(
                row,
                id=row.id if number == 1 else f"{row.id}#{number}",
                question=question,
                answers=answer,
                images=row.images[:image_count],
                history=replace_questions(row.history[:end], earlier),
                videos=tuple(span for span in row.videos if span[1] <= image_count),
            )
        )
    return rows


class TaskData:
    """One split of a task, or a part of it; loaded by `load_split`.

    Attributes:
        recipe: the recipe, with its classes read from the source if it has `classes: from-source`.
        split: the split's name.
        ids: the examples' ids, in order.
        labels: the examples' labels, in order; None outside classification.
        dropped: ids of the examples that are left out because one of their images cannot be read.
        left_out: files next to the images that are not read, by kind: a suffix, `hidden`, and so on.
    """

    def __init__(
        self,
        recipe: Recipe,
        split: str,
        rows: list[Row],
        images: Images,
        dropped: list[str],
        left_out: dict[str, list[str]] | None = None,
    ) -> None:
        self.recipe = recipe
        self.split = split
        self.dropped = dropped
        self.left_out = left_out or {}
        self._rows = rows
        self._images = images

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[operator.index(index)]
        images = [self._images.image(p) for p in row.images]
        answers, meta = list(row.answers), dict(row.meta)
        return Example(row.id, images, row.question, answers, row.label, meta, row.history, row.videos)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"TaskData({self.recipe.name}/{self.split}, {len(self)} examples)"

    @property
    def ids(self) -> list[str]:
        """Ids of the examples, in order."""
        return [r.id for r in self._rows]

    @property
    def labels(self) -> list[int | None]:
        """Indices of the examples' classes, in order; None outside classification."""
        return [r.label for r in self._rows]

    @property
    def questions(self) -> list[str | None]:
        """Questions of the examples, in order, without reading an image."""
        return [r.question for r in self._rows]

    @property
    def histories(self) -> list[History]:
        """Turns before each example's question, in order; empty if there are none."""
        return [r.history for r in self._rows]

    @property
    def videos(self) -> list[Spans]:
        """Spans of the frames of each example's videos, in order; see `Example.videos`."""
        return [r.videos for r in self._rows]

    @property
    def answers(self) -> list[list[str]]:
        """Reference answers of each example, in order, without reading an image."""
        return [list(r.answers) for r in self._rows]

    @property
    def meta(self) -> list[dict[str, Any]]:
        """Other inputs of a metric for each example, in order."""
        return [dict(r.meta) for r in self._rows]

    @property
    def image_counts(self) -> list[int]:
        """Number of images of each example, in order."""
        return [len(r.images) for r in self._rows]

    @property
    def image_sizes(self) -> list[list[tuple[int, int]]]:
        """(height, width) of each example's images, in order, without decoding an image again."""
        return [[self._images.size(p) for p in r.images] for r in self._rows]

    def stored_bytes(self, indices: Iterable[int]) -> int:
        """Return how many bytes some examples take: their images as they are stored, each once, and texts."""
        rows = [self._rows[operator.index(i)] for i in indices]
        images = {p for r in rows for p in r.images}
        return sum(map(self._images.stored_bytes, images)) + sum(
            len(text.encode()) for r in rows for text in r.texts
        )

    @property
    def image_times(self) -> list[list[tuple[float, float] | None]]:
        """Time of each example's images in their videos, and the videos' lengths, in seconds.

        None where they are not known, and nothing for examples without a video.
        """
        return [[self._images.time(p) for p in r.images] if r.videos else [] for r in self._rows]

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each image, example by example; see `Images.digest`."""
        return [digest for digests in self.image_digests for digest in digests]

    @property
    def image_digests(self) -> list[tuple[str, ...]]:
        """SHA-256 of the images of each example, in order."""
        return [tuple(self._images.digest(p) for p in r.images) for r in self._rows]

    @property
    def decoding_notes(self) -> list[str]:
        """Notes of decoding, for images that have one; see `decoding.Decoded`."""
        used = {p for r in self._rows for p in r.images}
        return [note for p, note in sorted(self._images.notes.items()) if p in used]

    @property
    def left_out_note(self) -> str | None:
        """Sentence on the files that are not read, by kind with the first few names; None without any."""
        if not self.left_out:
            return None
        names = sorted(name for files in self.left_out.values() for name in files)
        kinds = ", ".join(f"{kind}: {len(files)}" for kind, files in sorted(self.left_out.items()))
        first = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        return f"{len(names)} files are not read and left out ({kinds}; {first})"

    @cached_property
    def marker_note(self) -> str | None:
        """Sentence on the examples with markers of other tools in their texts; None if there are none."""
        markers = {r.id: marker for r in self._rows for text in r.texts if (marker := foreign_marker(text))}
        if not markers:
            return None
        name, marker = next(iter(markers.items()))
        return (
            f"{len(markers)} examples have markers of other tools in their texts, which are words to the "
            f"model ({name}: {marker}); {MARKER} is the place of an image"
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the recipe's fingerprint and each example's id, texts, label and image hashes.

        It does not depend on the folder or the order of the data, and changes with every byte of an image.
        """
        total = hashlib.sha256(self.recipe.fingerprint.encode())
        for r in sorted(self._rows, key=lambda r: r.id):
            hashes = [self._images.digest(p) for p in r.images]
            # A single image is no list, and meta, history and videos are left out if empty, so that
            # fingerprints of earlier versions stay the same.
            fact: list[Any] = [
                r.id,
                r.label,
                r.question,
                r.answers,
                hashes[0] if len(hashes) == 1 else hashes,
            ]
            fact += [r.meta] if r.meta else []
            fact += [[[m.role, m.text] for m in r.history]] if r.history else []
            fact += [[list(span) for span in r.videos]] if r.videos else []
            total.update(
                json.dumps(fact, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode() + b"\n"
            )
        return total.hexdigest()

    def take(self, indices: Iterable[int]) -> TaskData:
        """Return the examples at these positions, in this order; images and their hashes are shared.

        Raises:
            IndexError: a position is out of range.
        """
        rows = [self._rows[operator.index(i)] for i in indices]
        return TaskData(self.recipe, self.split, rows, self._images, self.dropped, self.left_out)

    def with_answers(self, answers: Sequence[str]) -> TaskData:
        """Return the same examples with one other answer each, in order; images and hashes are shared."""
        rows = [replace(row, answers=(text,)) for row, text in zip(self._rows, answers, strict=True)]
        return TaskData(self.recipe, self.split, rows, self._images, self.dropped, self.left_out)

    def with_questions(self, questions: Sequence[str]) -> TaskData:
        """Return the same examples with other questions, in order; images and hashes are shared."""
        rows = [replace(row, question=text) for row, text in zip(self._rows, questions, strict=True)]
        return TaskData(self.recipe, self.split, rows, self._images, self.dropped, self.left_out)

    def split_holdout(self, fraction: float, seed: int) -> tuple[TaskData, TaskData]:
        """Split off a validation part, with the same share of every class.

        Examples are chosen by a hash of (seed, id), so the choice depends on neither their order nor the
        number of processes. Every class keeps at least one example in the first part.

        Args:
            fraction: share of the second part, between 0 and 1.
            seed: seed of the choice.

        Returns:
            The rest and the holdout, both in the order of the data.

        Raises:
            RecipeError: the fraction is not between 0 and 1, or too small for a single example.
        """
        if not 0 < fraction < 1:
            raise RecipeError(
                f"a holdout of {fraction} of {self!r} is impossible", "give a fraction between 0 and 1"
            )
        groups: dict[int | None, list[int]] = defaultdict(list)
        for i, r in enumerate(self._rows):
            groups[r.label].append(i)
        held: set[int] = set()
        for group in groups.values():
            group.sort(key=lambda i: hashlib.sha256(f"{seed}:{self._rows[i].id}".encode()).digest())
            # At least one per class, so that every class is validated, but never the last one.
            count = min(max(1, round(fraction * len(group))), len(group) - 1)
            held.update(group[:count])
        if not held:
            raise RecipeError(
                f"{self!r} has one example per class, so nothing can be held out",
                "use more examples or no holdout",
            )
        everything = range(len(self))
        return self.take(i for i in everything if i not in held), self.take(
            i for i in everything if i in held
        )
