"""One question and its answer, out of the layouts in which people write conversations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import RecipeError

#: What LLaVA's files write where a picture goes.
MARKER = "<image>"


@dataclass(frozen=True)
class Turn:
    """One question and its answers.

    Attributes:
        question: without image markers.
        answers: the accepted texts; empty where they stand in another file.
        markers: how many images the question marks; 0 where it marks none and leaves the place open.
    """

    question: str
    answers: list[str]
    markers: int = 0


def from_conversations(turns: Any, what: str) -> Turn:
    """A LLaVA conversation: one `human` and one `gpt` turn with `value`.

    Source of the layout: github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md.

    Args:
        turns: the value of `conversations`.
        what: the record, for the error's sentence.

    Raises:
        RecipeError: there is another number of turns, or one of them is not text.
    """
    speakers = _roles(turns, "from")
    if speakers != ["human", "gpt"] or not all(isinstance(t.get("value"), str) for t in turns):
        raise RecipeError(
            f"{what} is not one question ('human') and one answer ('gpt')",
            "split longer conversations into one record per question",
        )
    return _turn(turns[0]["value"], [turns[1]["value"]], 0, what)


def from_fields(row: dict[str, Any], answer_field: str, answered: bool, what: str) -> Turn:
    """A LLaVA test record: `text` and an answer, which is text, a number, or a list of accepted ones.

    Source of the layout: github.com/haotian-liu/LLaVA, docs/Evaluation.md.

    Args:
        row: the record.
        answer_field: the field with the answer.
        answered: whether the record has to hold the answer itself.
        what: the record, for the error's sentence.

    Raises:
        RecipeError: a field is missing or empty.
    """
    if "text" not in row or (answered and answer_field not in row):
        raise RecipeError(
            f"{what} has neither 'conversations' nor 'text' and '{answer_field}'", "add one of them"
        )
    answer = row.get(answer_field) if answered else []
    if not isinstance(row["text"], str) or (answered and answer in (None, [])):
        raise RecipeError(f"{what} has no question or no answer", "complete or remove the record")
    return _turn(row["text"], [str(a) for a in (answer if isinstance(answer, list) else [answer])], 0, what)


def from_messages(messages: Any, what: str) -> Turn:
    """A chat as TRL and transformers write it: `role` and `content`, which is text or a list of typed parts.

    Parts of the type `text` are joined by line breaks; parts of the type `image` only mark where a
    picture goes, and the pictures themselves stand in the record. A system message is refused, because
    the chat template of a model brings its own.

    Source of the layout: huggingface.co/docs/trl/dataset_formats and
    huggingface.co/docs/transformers/chat_templating_multimodal.

    Args:
        messages: the value of `messages`.
        what: the record, for the error's sentence.

    Raises:
        RecipeError: there is another number of messages, or one holds something else.
    """
    roles = _roles(messages, "role")
    if "system" in roles:
        raise RecipeError(
            f"{what} has a system message, and the model's chat template has its own",
            "remove it, or write it at the head of the question",
        )
    if roles != ["user", "assistant"]:
        raise RecipeError(
            f"{what} is not one question ('user') and one answer ('assistant')",
            "split longer conversations into one record per question",
        )
    question, markers = _content(messages[0].get("content"), what)
    answer, marked = _content(messages[1].get("content"), what)
    if marked:
        raise RecipeError(f"{what} shows an image in its answer", "answer with text alone")
    return _turn(question, [answer], markers, what)


def check_markers(turn: Turn, images: int, what: str) -> None:
    """Refuse a question that marks another number of images than the record has.

    Raises:
        RecipeError: the two numbers differ; a question without markers fits any number.
    """
    if turn.markers not in (0, images):
        raise RecipeError(
            f"{what} marks {turn.markers} image{'s' * (turn.markers > 1)} in its question and names {images}",
            "mark and name the same number, or remove the markers",
        )


def _roles(turns: Any, key: str) -> list[Any]:
    if not isinstance(turns, list):
        return []
    return [t.get(key) if isinstance(t, dict) else None for t in turns]


def _content(content: Any, what: str) -> tuple[str, int]:
    """The text of a message, and how many images it marks."""
    if isinstance(content, str):
        return content, 0
    if not isinstance(content, list) or not all(isinstance(p, dict) for p in content):
        raise RecipeError(
            f"{what} has a message whose content is neither text nor a list of parts", "correct its 'content'"
        )
    texts, images = [], 0
    for part in content:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"].strip())
        elif kind != "image":
            raise RecipeError(f"{what} has a part of the type {kind!r} without text", "use the types text and image")
        elif any(part.get(key) is not None for key in ("image", "path", "url", "base64")):
            raise RecipeError(
                f"{what} holds an image inside a message", "list the images under 'images' of the record"
            )
        else:
            images += 1
    return "\n".join(texts), images


def _turn(question: str, answers: list[str], images: int, what: str) -> Turn:
    if any(MARKER in a for a in answers):
        raise RecipeError(f"{what} marks an image in its answer", f"remove {MARKER} there")
    # LLaVA itself takes the markers out and shows the images first, wherever they stood
    return Turn(question.replace(MARKER, "").strip(), answers, images + question.count(MARKER))
