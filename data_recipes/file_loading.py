"""Loading of a split from files or the Hub: records are read, checked and turned into examples."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .decoding import WHITE
from .errors import RecipeError, collect_errors, report_error
from .images import EncodedImages
from .labels import label_reader, resolve_classes
from .placeholders import MARKER, refuse_marked
from .prompts import format_turns
from .readers import make_reader, read_records
from .recipe import EACH, Recipe
from .records import History, Records, Spans
from .task_data import Row, TaskData, turns_of
from .texts import is_blank

log = logging.getLogger(__name__)


def load_files(
    recipe: Recipe,
    split: str,
    data_root: str | Path | None,
    on_bad_image: str,
    problems: list[RecipeError] | None = None,
) -> TaskData:
    """Load and check one split that is in files or on the Hub.

    Args:
        recipe, split, data_root: see `loading.load_split`.
        on_bad_image: `refuse` or `drop`.
        problems: list that collects the errors of single records and images, which are left out; they are
            raised when None.

    Raises:
        RecipeError: the data differ from the recipe's description; the message says where.
    """
    where = f"{recipe.name}/{split}"
    records = read_records(recipe, split, data_root, problems)
    if not records.ids:
        others = sum(map(len, records.left_out.values()))
        unread = f" ({others} files are not read: {', '.join(sorted(records.left_out))})" if others else ""
        raise RecipeError(
            f"{where} holds no examples{unread}", "add files, or correct 'splits' in the recipe"
        )
    _refuse_duplicates(recipe, records.ids, where, problems)
    # Errors in the records of another split are reported when that one is loaded.
    recipe = resolve_classes(
        recipe, split, records, lambda recipe, other: read_records(recipe, other, data_root, [])
    )
    rows = _rows(recipe, split, records, where, problems)
    images = EncodedImages(records.images, recipe.background or WHITE)
    good, dropped = _readable(rows, images, where, on_bad_image, problems)
    data = TaskData(recipe, split, good, images, dropped, records.left_out)
    _refuse_empty(data, where, problems)
    return data


def _rows(
    recipe: Recipe, split: str, records: Records, where: str, problems: list[RecipeError] | None
) -> list[Row]:
    label_of = label_reader(recipe, records, where)

    def rows_of(
        record: tuple[str, History, str | None, list[str], Any, tuple[int, ...], dict, Spans],
    ) -> list[Row]:
        name, history, question, answers, raw, images, meta, videos = record
        if recipe.kind != "classification":
            what = f"'{name}' in {where}"
            for answer in answers:
                refuse_marked(answer, "answer", what)
            history, text = format_turns(recipe, split, history, question, answers, len(images), what)
            row = Row(name, text, tuple(answers), None, images, meta, history, videos)
            rows = turns_of(row) if split == "test" and recipe.evaluate == EACH else [row]
            for row in rows:
                _refuse_blank_question(row, where)
            return rows
        if history:
            raise RecipeError(
                f"'{name}' in {where} has a conversation before its question, and a classification task asks "
                "its own",
                "leave the question and the class alone in it, or use the kind vqa",
            )
        if len(images) != 1:
            raise RecipeError(
                f"'{name}' in {where} has {len(images)} images, and classification needs one",
                "give every record one image, or use the kind vqa",
            )
        label = label_of(name, raw)
        return [Row(name, None, (recipe.classes[label],), label, images, meta)]

    columns = (
        records.histories,
        records.questions,
        records.answers,
        records.labels,
        records.images.shown,
        records.meta,
        records.videos,
    )
    rows_of_records = collect_errors(rows_of, zip(records.ids, *columns, strict=True), problems)
    rows = [row for several in rows_of_records for row in several]
    if len(rows) > len(rows_of_records):
        _refuse_duplicates(recipe, [row.id for row in rows], where, problems)
    return rows


def _refuse_blank_question(row: Row, where: str) -> None:
    if is_blank((row.question or "").replace(MARKER, "")):
        raise RecipeError(
            f"'{row.id}' in {where} has nothing to ask",
            "write a question in every record, or for captioning an instruction as 'prompt' in the recipe",
        )


def _readable(
    rows: list[Row],
    images: EncodedImages,
    where: str,
    on_bad_image: str,
    problems: list[RecipeError] | None,
) -> tuple[list[Row], list[str]]:
    """Return the rows whose images can all be read, and the ids of the others."""
    # An image of several examples is reported with the first of them; one that no example shows (the same
    # picture in a second column) is no matter.
    owners = {p: r.id for r in reversed(rows) for p in r.images}
    bad = {p: why for p, why in images.check(where).items() if p in owners}
    if not bad:
        return rows, []
    good = [r for r in rows if not any(p in bad for p in r.images)]
    dropped = [r.id for r in rows if any(p in bad for p in r.images)]
    counted = f"{len(bad)} of {len(owners)} images of {where} cannot be read"
    named = _once_per_video(sorted(bad), images)
    if problems is not None:
        problems += [
            RecipeError(
                f"{'a video' if images.frame(p) else 'an image'} of '{owners[p]}' in {where} cannot be read "
                f"({bad[p]})",
                "replace it, or correct its path",
            )
            for p in named
        ]
    elif on_bad_image == "refuse":
        first = ", ".join(f"{owners[p]}: {bad[p]}" for p in named[:3])
        raise RecipeError(f"{counted} ({first})", "replace them, or leave them out with on_bad_image: drop")
    else:
        log.warning("%s: %d of %d examples are left out", counted, len(dropped), len(rows))
    return good, dropped


def _once_per_video(rows: Sequence[int], images: EncodedImages) -> list[int]:
    """Return the rows of images without those that are further frames of one video file."""
    frames = {row: images.frame(row) for row in rows}
    first = {frame.path: row for row, frame in reversed(frames.items()) if frame}
    return [row for row, frame in frames.items() if frame is None or first[frame.path] == row]


def _refuse_duplicates(
    recipe: Recipe, ids: list[str], where: str, problems: list[RecipeError] | None
) -> None:
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if not twice:
        return
    cure = "give every example its own id"
    if recipe.evaluate == EACH:
        cure += ", which 'evaluate: each' makes by adding #2, #3, ... to that of a conversation"
    if "positional_ids" in make_reader(recipe.source).keys():
        cure += f", or number them with 'source.positional_ids: [{where.rsplit('/', 1)[1]}]' in the recipe"
    names = ", ".join(twice[:3]) + (", ..." if len(twice) > 3 else "")
    report_error(RecipeError(f"{where} has {len(twice)} ids more than once ({names})", cure), problems)


def _refuse_empty(data: TaskData, where: str, problems: list[RecipeError] | None) -> None:
    if not len(data):
        # Examples that are refused for another reason have been reported, and their images may be valid.
        if data.dropped:
            report_error(RecipeError(f"{where} has no readable image left", "replace the images"), problems)
        return
    if data.split != "train" or data.recipe.kind != "classification":
        return
    present = set(data.labels)
    empty = [c for i, c in enumerate(data.recipe.classes) if i not in present]
    if empty:
        names = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        error = RecipeError(
            f"{len(empty)} of {len(data.recipe.classes)} classes have no example in {where} ({names})",
            "add examples, or remove the classes from the recipe",
        )
        report_error(error, problems)
