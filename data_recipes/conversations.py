"""Conversations in JSON and JSONL files: LLaVA's records, and chats with messages."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .conversation_turn import (
    Turn,
    from_conversations,
    from_fields,
    from_pairs,
    from_turns,
    refuse_objects,
    show_turn,
    with_system,
)
from .errors import RecipeError, collect_errors
from .json_files import read_rows
from .labels import warn_of_names
from .media import UNREAD, VIDEO_ENDINGS, image_names, is_empty, refuse_unread_media, system_text, video_names
from .paths import data_root_of, images_folder, inside, split_file, within
from .placeholders import MARKER
from .recipe import Recipe
from .records import Frame, ListedFrame, Records, Spans, image_files
from .references import read_references
from .texts import identifier, only_answer
from .videos import refuse_without_decoder, sample

#: (record, whether it must have its answer, the record's name in errors) → its question and answers
TurnOf = Callable[[dict[str, Any], bool, str], Turn]
#: A record's id, its image files and frames, its texts, its meta, and the spans of its videos' frames.
Found = tuple[str, list[Path | Frame | ListedFrame], Turn, dict[str, Any], Spans]


def read_llava(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read LLaVA's records: `id`, `image`, `conversations`, or `question_id`, `image`, `text`, `answer`.

    `image` is a path, a list of paths, or absent (a question without an image). Paths are relative to
    `source.images` in the task's folder, by default that folder itself.

    Raises:
        RecipeError: the file is missing or not JSON, or records are incomplete, which the message lists.
    """
    answer_field = recipe.source["answer"]
    numbered = split in recipe.source["positional_ids"]

    def turn(row: dict[str, Any], answered: bool, what: str) -> Turn:
        if not numbered and _given_id(row) is None:
            raise RecipeError(
                f"{what} has no 'id'",
                f"give every record its own id, or number them with 'source.positional_ids: [{split}]' in "
                "the recipe",
            )
        if not is_empty(row.get("messages")):
            raise RecipeError(f"{what} holds 'messages'", "write 'format: messages' in the recipe")
        in_fields = not is_empty(row.get("text")) and not is_empty(row.get(answer_field))
        if "conversations" not in row or (is_empty(row["conversations"]) and in_fields):
            return from_fields(row, answer_field, answered, what)
        read = from_conversations(row["conversations"], what)
        if in_fields and not _is_same(read, from_fields(row, answer_field, answered, what), answered):
            raise RecipeError(
                f"{what} holds one question or answer in 'conversations' and another in 'text' and "
                f"'{answer_field}'",
                "keep those that are meant",
            )
        return read

    return _read(recipe, split, data_root, problems, turn)


def _is_same(one: Turn, other: Turn, answered: bool) -> bool:
    """Return whether two readings of a record have the same question, but for markers, and answer."""
    first, second = (turn.question.replace(MARKER, "").strip() for turn in (one, other))
    return first == second and (not answered or one.answers == other.answers)


def read_messages(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read chats: `messages`, and optionally `images` or `image` with a path or a list of paths.

    A record may have an `id`; without one it is numbered. For the layout see
    `conversation_turn.from_turns`; instead of `messages`, ms-swift's older records have `query`,
    `response` and optionally `history` (`conversation_turn.from_pairs`).

    Raises:
        RecipeError: the file is missing or not JSON, or records are incomplete, which the message lists.
    """

    def turn(row: dict[str, Any], answered: bool, what: str) -> Turn:
        if "messages" in row:
            read = from_turns(row["messages"], what)
        elif "response" in row:
            read = from_pairs(row.get("query"), row["response"], row.get("history"), what)
        else:
            raise RecipeError(
                f"{what} has no 'messages'", "add them, or write 'format: llava_json' in the recipe"
            )
        refuse_objects(read, row, what)
        return read

    return _read(recipe, split, data_root, problems, turn)


def _read(
    recipe: Recipe,
    split: str,
    data_root: str | Path | None,
    problems: list[RecipeError] | None,
    turn_of: TurnOf,
) -> Records:
    path = split_file(recipe, split, data_root)
    return read_turn_records(recipe, split, data_root, problems, path, read_rows(path, problems), turn_of)


def read_turn_records(
    recipe: Recipe,
    split: str,
    data_root: str | Path | None,
    problems: list[RecipeError] | None,
    path: Path,
    rows: list[Any],
    turn_of: TurnOf,
) -> Records:
    """Return the records of a file's rows.

    Args:
        recipe, split, data_root, problems: see `Reader.read`.
        path: the file, for errors.
        rows: the file's records.
        turn_of: reads a record's question, answers and earlier turns.

    Raises:
        RecipeError: records are incomplete, which the message lists.
    """
    folder, root = images_folder(recipe, split, data_root), data_root_of(recipe, data_root)
    references = read_references(recipe, split, data_root, rows, problems)
    numbered = split in recipe.source["positional_ids"]
    fields = recipe.source["meta"]
    classify = recipe.kind == "classification"

    def record(item: tuple[int, Any]) -> Found:
        index, row = item
        if not isinstance(row, dict):
            raise RecipeError(f"record {index} of {path.name} is not a JSON object", "correct the file")
        given = _given_id(row)
        name = None if given is None else identifier(given, f"record {index} of {path.name}")
        what = f"record {index if name is None else repr(name)} of {path.name}"
        turn = with_system(turn_of(row, references is None, what), system_text(row, what), what)
        refuse_unread_media(row, what, UNREAD)
        images, videos = image_names(row, what), video_names(row, what)
        answers = turn.answers if references is None else references(index, what)
        answers = [only_answer(answers, what)] if classify else answers
        files: list[Path | Frame | ListedFrame] = [inside(folder, i, what, root) for i in images]
        frames = [_frames(video, recipe, folder, what, root) for video in videos]
        turn, files_in_order, spans = show_turn(
            Turn(turn.question, answers, turn.history), files, frames, what
        )
        record_id = f"{split}-{index}" if numbered or name is None else name
        return record_id, files_in_order, turn, {f: row[f] for f in fields if f in row}, spans

    records = collect_errors(record, enumerate(rows), problems)
    if classify:
        given = (row.get(recipe.source.get("answer", "answer")) for row in rows if isinstance(row, dict))
        warn_of_names(recipe, {value for value in given if type(value) is int}, f"{recipe.name}/{split}")
    return _as_records(records, classify)


def _given_id(row: dict[str, Any]) -> Any:
    return next((row[key] for key in ("id", "question_id") if row.get(key) is not None), None)


def _frames(
    video: str | list[str], recipe: Recipe, folder: Path, what: str, root: Path
) -> list[Path | Frame | ListedFrame]:
    """Return `source.frames` frames of a video file, or so many files of a list of frames.

    A file may be named without its ending. Listed frames have times where the recipe has `source.fps`.
    """
    count, fps = recipe.source["frames"], recipe.source.get("fps")
    if isinstance(video, str):
        refuse_without_decoder(video, what)
        path = inside(folder, video, what, root).absolute()
        if not os.path.exists(path):  # unlike Path.exists, False for a name that no file can have
            named = (Path(f"{path}{ending}") for ending in VIDEO_ENDINGS)
            path = within(next(filter(os.path.isfile, named), path), what, root)
        return [Frame(str(path), index, count) for index in range(count)]
    places = sample(len(video), count)
    files = [inside(folder, video[place], what, root) for place in places]
    if fps is None:
        return [*files]
    return [ListedFrame(file, place / fps, len(video) / fps) for place, file in zip(places, files)]


def _as_records(records: list[Found], classify: bool) -> Records:
    turns = [turn for _, _, turn, _, _ in records]
    return Records(
        ids=[name for name, *_ in records],
        images=image_files([shown for _, shown, _, _, _ in records]),
        labels=[t.answers[0] if classify else None for t in turns],
        label_names=None,
        questions=[None if classify else t.question for t in turns],
        answers=[[] if classify else t.answers for t in turns],
        meta=[meta for _, _, _, meta, _ in records],
        histories=[t.history for t in turns],
        videos=[spans for *_, spans in records],
    )
