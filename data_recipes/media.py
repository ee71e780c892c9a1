"""Which pictures a record names, and the refusal of what is not read."""

from __future__ import annotations

from typing import Any

from .errors import RecipeError
from .texts import described, is_blank

IMAGES = ("image", "images")
#: Media that no model here is shown: a record that has some would be learned from its text alone.
UNREAD = ("video", "videos", "audio", "audios", "video_path", "video_url", "audio_path", "audio_url")
#: Where other tools' records name a picture; one that only stands there would be passed over.
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
#: Where a message or one of its parts may hold a picture itself.
_INNER = (
    *IMAGES,
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
    """The paths in `image` or `images`, whichever holds something: one path, or a list of them.

    Null, an empty text, an empty list, and a list of these hold nothing: sets that were merged have such a
    field in every record.

    Raises:
        RecipeError: a value is no path, the two fields hold different ones, or there is a video or audio.
    """
    refuse_unread_media(row, what)
    named = [listed for field in IMAGES if (listed := _listed(row.get(field), what))]
    if len(named) == 2 and named[0] != named[1]:
        raise RecipeError(
            f"{what} has {described(row['image'])} as 'image' and {described(row['images'])} as 'images'",
            "keep the one that is meant",
        )
    if not named and (field := _first_held(row, ELSEWHERE)):
        raise RecipeError(
            f"{what} has {described(row[field])} as '{field}', and pictures are read from 'image' or "
            "'images'",
            "rename the field, or remove it where no picture is meant",
        )
    return named[0] if named else []


def refuse_unread_media(row: dict[str, Any], what: str) -> None:
    """Refuse a record with a video or audio.

    Raises:
        RecipeError: it has one.
    """
    if field := _first_held(row, UNREAD):
        raise RecipeError(
            f"{what} has {described(row[field])} as '{field}', and {field[:5]} is not read",
            f"remove the record, use images of it, or remove '{field}' where it is not needed",
        )


def system_text(row: dict[str, Any], what: str) -> str | None:
    """Return the system message beside a record's turns; None where there is none.

    Raises:
        RecipeError: it is no text, or the record has tools, which no model here is given.
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
    """Refuse a turn or a part that holds a picture, or something else that is shown, itself.

    Args:
        place: the turn, or a part of it.
        what: what it is, for the error's sentence.

    Raises:
        RecipeError: it holds one.
    """
    if key := _first_held(place, _INNER):
        raise RecipeError(
            f"{what} holds '{key}' itself",
            "list images under 'images' of the record, and remove anything else",
        )


def _first_held(place: dict[str, Any], fields: tuple[str, ...]) -> str | None:
    """Return the first of these fields that holds something; None where none does."""
    return next((field for field in fields if not is_empty(place.get(field))), None)


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing."""
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
