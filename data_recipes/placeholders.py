"""Where in a text pictures go: the one rule for placeholders, in every format and in a recipe's prompts."""

from __future__ import annotations

import re

from .errors import RecipeError

#: Marks the place of a picture.
MARKER = "<image>"
_AT_HEAD = re.compile(rf"^(?:\s*{MARKER})+")
#: Mark what no model here is shown, in the spellings of many tools: `<video>`, `<|video_pad|>`, `<audio_0>`,
#: `[AUDIO]`.
_UNREAD = re.compile(
    r"<\|(?P<token>video|audio)[^|<>\n]{0,20}\|>|<(?P<tag>video|audio)[ _-]?\d*>"
    r"|\[(?P<word>(?-i:VIDEO|AUDIO))\]",
    re.IGNORECASE,
)
#: Mark a picture for another tool, and are words here: `<IMAGE>`, `<image_0>` and `<image 1>` (MMMU),
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
    """A question with the places of its pictures.

    A text without markers has its pictures before it. One with markers has to mark as many places as there
    are pictures; where they all stand before the text, they are taken out, which means the same. A lone
    picture after the whole text goes before it too, as LLaVA's own preprocessing puts it, because half of
    its data are written so (`preprocess_multimodal` in github.com/haotian-liu/LLaVA, llava/train/train.py).
    Every other place is kept: the text that is returned holds one marker for each picture.

    Markers of other tools are words. They are refused where a picture is missing or its place would be lost:
    beside none, or several pictures. Beside a single one, as MATH-Vision and MMMU have them, they are only
    reported (`TaskData.marker_note`).

    Args:
        text: what is asked.
        images: how many pictures go with it.
        what: the record or recipe, for the error's sentence.

    Raises:
        RecipeError: the two numbers differ, a video or audio is marked, or a picture in another tool's way.
    """
    refuse_unread(text, what)
    if images != 1 and (marker := foreign_marker(text)):
        raise RecipeError(
            f"{what} has {marker} in its text, which marks an image for other tools only, and names {images}",
            f"write {MARKER} where each image goes, or remove the record",
        )
    marked = text.count(MARKER)
    if not marked:
        return text
    if marked != images:
        raise RecipeError(
            f"{what} marks {marked} image{'s' * (marked > 1)} in its question and names {images}",
            "mark and name the same number, or remove the markers",
        )
    rest = _AT_HEAD.sub("", text).strip()
    if images == 1 and rest.endswith(MARKER):
        return rest.removesuffix(MARKER).rstrip()
    return text.strip() if MARKER in rest else rest


def refuse_marked_answer(answer: str, what: str) -> None:
    """Refuse an answer that marks a picture, a video or audio.

    Raises:
        RecipeError: it does.
    """
    refuse_unread(answer, what)
    if MARKER in answer:
        raise RecipeError(f"{what} marks an image in its answer", f"remove {MARKER} there")


def refuse_unread(text: str, what: str) -> None:
    """Refuse a text that marks a video or audio, which would be learned from its text alone.

    Raises:
        RecipeError: it does.
    """
    if unread := _UNREAD.search(text):
        medium = next(filter(None, unread.groups())).lower()
        raise RecipeError(
            f"{what} has {unread[0]} in its text, and {medium} is not read",
            "remove the record, or use images of it",
        )


def refuse_foreign(text: str, what: str) -> None:
    """Refuse a text of a recipe that marks a video, an audio, or a picture in another tool's way.

    Raises:
        RecipeError: it does.
    """
    refuse_unread(text, what)
    if marker := foreign_marker(text):
        raise RecipeError(
            f"{what} has {marker}, which marks an image for other tools only", f"write {MARKER}, or remove it"
        )


def foreign_marker(text: str) -> str | None:
    """The first marker of another tool in a text; None where there is none."""
    found = _FOREIGN.search(text) if "<" in text or "[" in text else None
    return found[0][:60] if found else None
