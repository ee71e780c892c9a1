"""Images that a record names, and the refusal of media that are not supported."""

from __future__ import annotations

from typing import Any

from .errors import RecipeError
from .texts import described, is_blank

IMAGES = ("image", "images")
VIDEOS = ("video", "videos")
#: Endings of video files; in a list of files they distinguish videos from frames.
VIDEO_ENDINGS = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp"),
    *(".mts", ".m2ts"),
)
#: Endings of image files; a single one is no video.
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
#: Fields of media that are not supported: such a record would be learned from its text alone.
UNREAD = ("audio", "audios", "video_path", "video_url", "audio_path", "audio_url")
#: Fields in which other tools' records name an image; without this list it would be ignored.
ELSEWHERE = (
    "image_path",
    "image_paths",
    "image_file",
    "image_url",
    "image_urls",
    "img",
    "img_path",
    "picture",
    "pictures",
)
#: Fields in which a message or one of its parts may hold an image itself.
_INNER = (
    *IMAGES,
    *VIDEOS,
    *UNREAD,
    "path",
    "url",
    "base64",
    "image_url",
    "video_url",
    "input_audio",
    "tool_calls",
    "reasoning_content",
)


def image_names(row: dict[str, Any], what: str) -> list[str]:
    """Return the paths in `image` or `images`, whichever is not empty: one path, or a list of them.

    Null, an empty text, an empty list, and a list of these are empty: merged data sets have such a field in
    every record.

    Raises:
        RecipeError: a value is no path, or the two fields have different ones.
    """
    named = [listed for field in IMAGES if (listed := _listed(row.get(field), what))]
    if len(named) == 2 and named[0] != named[1]:
        raise RecipeError(
            f"{what} has {described(row['image'])} as 'image' and {described(row['images'])} as 'images'",
            "keep the one that is meant",
        )
    if not named and not _first_held(row, (*VIDEOS, "video_name")) and (field := _first_held(row, ELSEWHERE)):
        raise RecipeError(
            f"{what} has {described(row[field])} as '{field}', and images are read from 'image' or 'images'",
            "rename the field, or remove it where no image is meant",
        )
    return named[0] if named else []


def video_names(row: dict[str, Any], what: str) -> list[str | list[str]]:
    """Return a record's videos, each as its file or as the list of its frames' files.

    A text in `video` or `videos` is a video file; so is one in `video_name`, where there are neither, as in
    Video-ChatGPT's questions. A list has one entry per video: a file with the ending of a video, or the list
    of its frames' files, in order. `video` itself may be the list of one video's frames.

    Raises:
        RecipeError: a value is anything else, or the two fields have different ones.
    """
    named = [entries for field in VIDEOS if (entries := _videos(row.get(field), field, what))]
    if len(named) == 2 and named[0] != named[1]:
        raise RecipeError(
            f"{what} has {described(row['video'])} as 'video' and {described(row['videos'])} as 'videos'",
            "keep the one that is meant",
        )
    return named[0] if named else _videos(row.get("video_name"), "video_name", what)


def _videos(value: Any, field: str, what: str) -> list[str | list[str]]:
    if is_empty(value):
        return []
    if isinstance(value, str) and not value.lower().endswith(IMAGE_ENDINGS):
        return [value]
    entries = value if isinstance(value, list) else [[]]
    if field == "video" and all(
        isinstance(e, str) and not e.lower().endswith(VIDEO_ENDINGS) for e in entries
    ):
        entries = [entries]
    lists = [entry if isinstance(entry, list) else [entry] for entry in entries]
    texts = [name for names in lists for name in names]
    if not all(lists) or not all(isinstance(name, str) and not is_blank(name) for name in texts):
        raise RecipeError(
            f"{what} has {described(value)} as its {field}",
            f"write a video file, a list of files of frames, or leave '{field}' out",
        )
    for entry, names in zip(entries, lists, strict=True):
        frames = isinstance(entry, list)
        if wrong := next((n for n in names if n.lower().endswith(VIDEO_ENDINGS) == frames), None):
            raise RecipeError(
                f"{what} has '{wrong}' among the {'frames of a video' if frames else field}",
                "list the frames of each video in a list of their own, and video files outside of these",
            )
    return entries


def refuse_unread_media(row: dict[str, Any], what: str, fields: tuple[str, ...] = (*VIDEOS, *UNREAD)) -> None:
    """Refuse a record with media in fields that are not read: the model would learn from the rest alone.

    Raises:
        RecipeError: one of these fields is not empty.
    """
    if field := _first_held(row, fields):
        raise RecipeError(
            f"{what} has {described(row[field])} as '{field}', and {field[:5]} is not read",
            f"remove the record, use images of it, or remove '{field}' where it is not needed",
        )


def system_text(row: dict[str, Any], what: str) -> str | None:
    """Return the system message of a record that has it outside its turns; None if there is none.

    Raises:
        RecipeError: it is not text, or the record has tools, which are not supported.
    """
    if not is_empty(row.get("tools")):
        raise RecipeError(
            f"{what} has {described(row['tools'])} as 'tools', which no model here is given",
            "remove 'tools', or the record",
        )
    system = row.get("system")
    if is_empty(system):
        return None
    if not isinstance(system, str):
        raise RecipeError(
            f"{what} has {described(system)} as 'system', and a system message is text",
            "correct it, or remove 'system'",
        )
    return system


def refuse_inner_media(place: dict[str, Any], what: str) -> None:
    """Refuse a turn, or a part of one, that holds an image or other media itself.

    Args:
        place: the turn, or a part of it.
        what: its name, for errors.

    Raises:
        RecipeError: it holds such media.
    """
    if key := _first_held(place, _INNER):
        raise RecipeError(
            f"{what} holds '{key}' itself",
            "list images under 'images' of the record, and remove anything else",
        )


def _first_held(place: dict[str, Any], fields: tuple[str, ...]) -> str | None:
    """Return the first of these fields that is not empty; None if all are."""
    return next((field for field in fields if not is_empty(place.get(field))), None)


def is_empty(value: Any) -> bool:
    """Return whether a field's value is empty."""
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or value == {} or (isinstance(value, str) and is_blank(value))


def _listed(value: Any, what: str) -> list[str]:
    if is_empty(value):
        return []
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and not is_blank(name) for name in listed):
        raise RecipeError(
            f"{what} has {value!r} as its image", "write one path, a list of paths, or leave 'image' out"
        )
    return listed
