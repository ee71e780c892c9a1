"""Places of images in texts: the rules for placeholders, in all formats and in a recipe's prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeVar

from .errors import RecipeError
from .records import Spans

Item = TypeVar("Item")

#: Marker of an image's place.
MARKER = "<image>"
#: Marks the place of a video in a record, where its frames then have their places.
VIDEO_MARKER = "<video>"
_AT_HEAD = re.compile(rf"^(?:\s*{MARKER})+")
#: Markers of media that are not supported, in the spellings of many tools: `<video>`, `<|video_pad|>`,
#: `<audio_0>`, `[AUDIO]`.
_UNREAD = re.compile(
    r"<\|(?P<token>video|audio)[^|<>\n]{0,20}\|>|<(?P<tag>video|audio)[ _-]?\d*>"
    r"|\[(?P<word>(?-i:VIDEO|AUDIO))\]",
    re.IGNORECASE,
)
#: Image markers of other tools, which are words here: `<IMAGE>`, `<image_0>` and `<image 1>` (MMMU),
#: `<|image_pad|>` and `<img>...</img>` (Qwen), `<|image_1|>` (Phi), `<start_of_image>` (Gemma), `[IMG]`
#: (Pixtral), `<ImageHere>` (MiniGPT-4).
_FOREIGN = re.compile(
    r"<\|(?:image|img|vision)[^|<>\n]{0,20}\|>|<(?:image|img)[ _-]?\d+>"
    r"|<image[ _](?:pad|token|placeholder|soft_token)>|<imagehere>"
    r"|<(?:start|end)_of_image>|<img>.{0,1000}?</img>|</image>"
    r"|\[(?:img|image)(?:[ _-]?\d+)?\]|(?-i:(?!<image>))<\s*image\s*/?>",
    re.IGNORECASE,
)


def place_images(text: str, images: int, what: str) -> str:
    """Return a question with the places of its images; see `place_in_turns`."""
    return place_in_turns([text], images, what)[0]


def place_in_turns(questions: Sequence[str], images: int, what: str) -> list[str]:
    """Return the questions of a conversation with the places of their images.

    Without markers, the images come before the first question. With markers, the questions together must have
    as many as there are images, in the images' order; if all are before the first question's text, they are
    removed, which means the same. A question's only image, if it comes after the text, is moved before it, as
    in LLaVA's preprocessing, because half of its data are written so (`preprocess_multimodal` in
    github.com/haotian-liu/LLaVA, llava/train/train.py). Every other place is kept: the returned questions
    have one marker for each image, or none.

    Markers of other tools are words. They are refused with no image or several, where an image would be
    missing or its place lost. With a single image, as in MATH-Vision and MMMU, they are only reported
    (`TaskData.marker_note`).

    Args:
        questions: the questions of a conversation, at least one.
        images: how many images they have together.
        what: the record or recipe, for errors.

    Raises:
        RecipeError: the numbers of markers and images differ, a video or audio is marked, or an image with
            another tool's marker.
    """
    for text in questions:
        refuse_unread(text, what)
        if images != 1 and (marker := foreign_marker(text)):
            raise RecipeError(
                f"{what} has {marker} in its text, which marks an image for other tools only, and names "
                f"{images}",
                f"write {MARKER} where each image goes, or remove the record",
            )
    marked = sum(text.count(MARKER) for text in questions)
    if not marked:
        return list(questions)
    if marked != images:
        raise RecipeError(
            f"{what} marks {marked} image{'s' * (marked > 1)} in its "
            f"question{'s' * (len(questions) > 1)} and names {images}",
            "mark and name the same number, or remove the markers",
        )
    first, *later = [_lone_image_first(text) if MARKER in text else text for text in questions]
    rest = _AT_HEAD.sub("", first).strip()
    return [first if any(MARKER in text for text in (rest, *later)) else rest, *later]


def place_videos(
    questions: Sequence[str], images: Sequence[Item], videos: Sequence[Sequence[Item]], what: str
) -> tuple[list[str], list[Item], Spans]:
    """Return questions with places of frames for those of videos, all that is shown, and each video's span.

    `<video>` in a question is the place of a video, and there are as many as videos, or none. Where one kind
    is marked and the other is not, the other goes before the first question, images before videos. Without
    images, as many `<image>` as videos are places of videos, as LLaVA's video data have it, and as many as
    there are frames are those of the frames (Video-LLaVA).

    Args:
        questions: what is asked, by turns.
        images: the images, without the videos' frames.
        videos: the frames of each.
        what: the record, for the error's sentence.

    Raises:
        RecipeError: the questions mark another number of images or videos.
    """
    marked = sum(text.count(MARKER) for text in questions)
    clips = sum(text.count(VIDEO_MARKER) for text in questions)
    if not videos and not clips:
        return list(questions), list(images), ()
    lengths = [len(video) for video in videos]
    if not images and not clips and marked == sum(lengths):
        ends = list(accumulate(lengths))
        frames = [frame for video in videos for frame in video]
        return list(questions), frames, tuple(zip([0, *ends], ends, strict=False))
    if not images and not clips and marked == len(videos):
        questions, marked, clips = [t.replace(MARKER, VIDEO_MARKER) for t in questions], 0, marked
    for kind, count, given in (("image", marked, images), ("video", clips, videos)):
        if count not in (0, len(given)):
            raise RecipeError(
                f"{what} marks {count} {kind}{'s' * (count > 1)} in its "
                f"question{'s' * (len(questions) > 1)} and names {len(given)}",
                "mark and name the same number, or remove the markers",
            )
    ahead = MARKER * len(images) * (not marked) + VIDEO_MARKER * len(videos) * (not clips)
    first, *later = [_lone_first(text.strip(), VIDEO_MARKER) for text in questions]
    rest, following = iter(images), iter(videos)
    shown: list[Any] = []
    spans: list[tuple[int, int]] = []

    def take(match: re.Match[str]) -> str:
        taken = [next(rest)] if match[0] == MARKER else next(following)
        spans.extend([(len(shown), len(shown) + len(taken))] * (match[0] == VIDEO_MARKER))
        shown.extend(taken)
        return MARKER * len(taken)

    either = re.compile(f"{MARKER}|{VIDEO_MARKER}")
    placed = [either.sub(take, text) for text in (f"{ahead}\n{first}" if ahead else first, *later)]
    return placed, shown, tuple(spans)


def _lone_image_first(text: str) -> str:
    """Return a question with its only image before its text, if it was after it."""
    return _lone_first(text.strip(), MARKER)


def _lone_first(text: str, marker: str) -> str:
    if text.count(marker) == 1 and text.endswith(marker) and text != marker:
        return f"{marker}\n{text.removesuffix(marker).rstrip()}"
    return text


def refuse_marked(text: str, role: str, what: str) -> None:
    """Refuse an answer, or a system message, with a marker of an image, a video or audio.

    Args:
        text: the text.
        role: its role, for errors.
        what: the record, for errors.

    Raises:
        RecipeError: it has one.
    """
    refuse_unread(text, what)
    if MARKER in text:
        raise RecipeError(f"{what} marks an image in its {role}", f"remove {MARKER} there")


def refuse_unread(text: str, what: str) -> None:
    """Refuse a text with a marker of a video or audio, as its record would be learned from text alone.

    Raises:
        RecipeError: it has one.
    """
    if unread := _UNREAD.search(text):
        medium = next(filter(None, unread.groups())).lower()
        raise RecipeError(
            f"{what} has {unread[0]} in its text, and {medium} is not read there",
            "remove the record, or use images of it"
            if medium == "audio"
            else f"write {VIDEO_MARKER} in a question of a record that names the video, or remove the record",
        )


def refuse_foreign(text: str, what: str) -> None:
    """Refuse a text of a recipe with a marker of a video or audio, or with another tool's image marker.

    Raises:
        RecipeError: it has one.
    """
    refuse_unread(text, what)
    if marker := foreign_marker(text):
        raise RecipeError(
            f"{what} has {marker}, which marks an image for other tools only", f"write {MARKER}, or remove it"
        )


def foreign_marker(text: str) -> str | None:
    """Return the first image marker of another tool in a text; None if there is none."""
    match = _FOREIGN.search(text) if "<" in text or "[" in text else None
    return match[0][:60] if match else None
