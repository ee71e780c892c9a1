"""Where in a text pictures go: the one rule for placeholders, in every format and in a recipe's prompts."""

from __future__ import annotations

import re

from .errors import RecipeError

#: Marks the place of a picture.
MARKER = "<image>"
_AT_HEAD = re.compile(rf"^(?:\s*{MARKER})+")
#: Mark what no model here is shown.
_UNREAD = re.compile(r"<(video|audio)>")


def place_images(text: str, images: int, what: str) -> str:
    """A question with the places of its pictures.

    A text without markers has its pictures before it. One with markers has to mark as many places as there
    are pictures; where they all stand before the text, they are taken out, which means the same. A lone
    picture after the whole text goes before it too, as LLaVA's own preprocessing puts it, because half of
    its data are written so (`preprocess_multimodal` in github.com/haotian-liu/LLaVA, llava/train/train.py).
    Every other place is kept: the text that is returned holds one marker for each picture.

    Args:
        text: what is asked.
        images: how many pictures go with it.
        what: the record or recipe, for the error's sentence.

    Raises:
        RecipeError: the two numbers differ, or a video or audio is marked.
    """
    refuse_unread(text, what)
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
        raise RecipeError(
            f"{what} has {unread[0]} in its text, and {unread[1]} is not read",
            "remove the record, or use images of it",
        )
