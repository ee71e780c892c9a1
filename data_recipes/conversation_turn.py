"""One question and its answer, out of the layouts in which people write conversations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import RecipeError
from .media import refuse_inner_media
from .placeholders import MARKER
from .texts import answer_texts, described

SPLIT_UP = "split longer conversations into one record per question"


@dataclass(frozen=True)
class Turn:
    """One question and its answers.

    Attributes:
        question: with a marker wherever a picture goes, as the file has it; see `placeholders`.
        answers: the accepted texts; empty where they stand in another file.
    """

    question: str
    answers: list[str]


@dataclass(frozen=True)
class Layout:
    """How a conversation is written.

    Attributes:
        name: the key of its list.
        speaker: the key of who speaks in a turn.
        asks, answers: the two speakers.
    """

    name: str
    speaker: str
    asks: str
    answers: str


LLAVA = Layout("conversations", "from", "human", "gpt")
CHAT = Layout("messages", "role", "user", "assistant")


def from_conversations(turns: Any, what: str) -> Turn:
    """A LLaVA conversation: one `human` and one `gpt` turn with `value`.

    Source of the layout: github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md.

    Args:
        turns: the value of `conversations`.
        what: the record, for the error's sentence.

    Raises:
        RecipeError: it is anything else than one question and one answer, both text; the sentence says what.
    """
    question, answer = _pair(turns, LLAVA, what)
    for turn, role in ((question, "question"), (answer, "answer")):
        if not isinstance(turn.get("value"), str):
            raise RecipeError(
                f"{what} has {described(turn.get('value'))} as its {role}, and a conversation is text",
                "put quotes around it, or remove the record",
            )
    return Turn(question["value"].strip(), [answer["value"]])


def from_fields(row: dict[str, Any], answer_field: str, answered: bool, what: str) -> Turn:
    """A LLaVA test record: `text` and an answer; see `answer_texts`.

    Source of the layout: github.com/haotian-liu/LLaVA, docs/Evaluation.md.

    Args:
        row: the record.
        answer_field: the field with the answer.
        answered: whether the record has to hold the answer itself.
        what: the record, for the error's sentence.

    Raises:
        RecipeError: a field is missing or empty, or holds something else.
    """
    if "text" not in row:
        raise RecipeError(
            f"{what} has neither 'conversations' nor 'text' and '{answer_field}'", "add one of them"
        )
    if answered and answer_field not in row:
        raise RecipeError(
            f"{what} has no '{answer_field}'",
            "add it, or name the field of the answer with 'source.answer' in the recipe",
        )
    if not isinstance(row["text"], str):
        raise RecipeError(
            f"{what} has {described(row['text'])} as its question, and a question is text",
            "correct or remove the record",
        )
    return Turn(row["text"].strip(), answer_texts(row[answer_field], what) if answered else [])


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
        RecipeError: it is anything else than one question and one answer; the sentence says what.
    """
    question, answer = (_content(message.get("content"), what) for message in _pair(messages, CHAT, what))
    return Turn(question.strip(), [answer])


def _pair(turns: Any, layout: Layout, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The question's turn and the answer's."""
    if not isinstance(turns, list):
        raise RecipeError(
            f"{what} has {described(turns)} as its '{layout.name}', and not a list of turns",
            "correct the record",
        )
    if not turns:
        raise RecipeError(f"{what} has an empty list as its '{layout.name}'", "complete or remove the record")
    speakers = [_speaker(turn, number, layout, what) for number, turn in enumerate(turns, start=1)]
    if speakers[0] == layout.answers:
        raise RecipeError(
            f"{what} begins with an answer ('{layout.answers}')",
            "begin with the question, or remove the record",
        )
    if len(speakers) == 1:
        raise RecipeError(
            f"{what} has a question ('{layout.asks}') and no answer", "complete or remove the record"
        )
    for number, (one, other) in enumerate(zip(speakers, speakers[1:], strict=False), start=1):
        if one == other:
            kind = "questions" if one == layout.asks else "answers"
            raise RecipeError(
                f"{what} has two {kind} in a row (turns {number} and {number + 1}, '{one}')",
                "join or remove one of them",
            )
    if len(speakers) > 2:
        raise RecipeError(
            f"{what} has {len(speakers)} turns, and one question with one answer is learned from a record",
            SPLIT_UP,
        )
    return turns[0], turns[1]


def _speaker(turn: Any, number: int, layout: Layout, what: str) -> str:
    """Who speaks in a turn: the one who asks or the one who answers."""
    if not isinstance(turn, dict):
        raise RecipeError(
            f"{what} has {described(turn)} as turn {number}, and not an object", "correct the record"
        )
    speaker = turn.get(layout.speaker)
    if speaker == "system":
        raise RecipeError(
            f"{what} has a system message, and the model's chat template has its own",
            "remove it, or write it at the head of the question",
        )
    if speaker not in (layout.asks, layout.answers):
        given = f"no '{layout.speaker}'" if speaker is None else f"{described(speaker)} as '{layout.speaker}'"
        raise RecipeError(
            f"{what} has {given} in turn {number}, which is neither '{layout.asks}' nor '{layout.answers}'",
            f"name the one who asks '{layout.asks}' and the one who answers '{layout.answers}'",
        )
    refuse_inner_media(turn, f"turn {number} of {what}")
    return speaker


def _content(content: Any, what: str) -> str:
    """The text of a message, with a marker for every part that is an image."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content or not all(isinstance(p, dict) for p in content):
        raise RecipeError(
            f"{what} has a message with {described(content)} as its content, which is neither text nor parts",
            "correct its 'content', or remove the record",
        )
    return "\n".join(_part(part, what) for part in content)


def _part(part: dict[str, Any], what: str) -> str:
    kind = part.get("type")
    if kind not in ("text", "image"):
        raise RecipeError(
            f"{what} has a part of the type {kind!r}, which is not read", "use the types text and image"
        )
    if kind == "text" and not isinstance(part.get("text"), str):
        raise RecipeError(f"{what} has a part of the type 'text' without text", "add it, or remove the part")
    refuse_inner_media(part, f"a message of {what}")
    return part["text"].strip() if kind == "text" else MARKER
