"""A question, its answers and what was said before, from the layouts in which people write conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import RecipeError
from .media import is_empty, refuse_inner_media
from .placeholders import MARKER, VIDEO_MARKER, Item, place_in_turns, place_videos, refuse_marked
from .records import History, Message, Spans, replace_questions
from .texts import answer_texts, described, is_blank

#: What a turn says about whether it is learned (`loss` in ms-swift, `weight` in OpenAI's chats).
LEARNED = ("loss", "weight")


@dataclass(frozen=True)
class Turn:
    """The last question of a conversation, and its answers.

    Attributes:
        question: the question, with the file's markers for images; see `placeholders`.
        answers: the accepted texts; empty if they are in another file.
        history: turns before the question.
    """

    question: str
    answers: list[str]
    history: History = ()


@dataclass(frozen=True)
class Layout:
    """How a conversation is written.

    Attributes:
        name: the key of its list.
        speaker: key of a turn's speaker.
        content: key of a turn's text.
        roles: the layout's name of a speaker → the role of a `Message`; errors mention a role's first name.
        parts: whether `content` may be a list of typed parts.
    """

    name: str
    speaker: str
    content: str
    roles: Mapping[str, str]
    parts: bool = False

    def word(self, role: str) -> str:
        """Return the layout's first word for a role."""
        return next(word for word, meaning in self.roles.items() if meaning == role)


#: ShareGPT's exports name the model in many ways.
LLAVA = Layout(
    "conversations",
    "from",
    "value",
    {"human": "user", "user": "user"}
    | dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard"), "assistant")
    | {"system": "system"},
)
CHAT = Layout(
    "messages",
    "role",
    "content",
    {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
    | {"system": "system"},
    parts=True,
)


def from_conversations(turns: Any, what: str) -> Turn:
    """Read a LLaVA or ShareGPT conversation: turns with `from` and `value`; see `read_turns`.

    Source of the layout: github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md.
    """
    return read_turns(turns, LLAVA, what)


def from_messages(messages: Any, what: str) -> Turn:
    """Read a chat as TRL and transformers write it: turns with `role` and `content`; see `read_turns`.

    `content` is text or a list of typed parts. Parts of the type `text` are joined by line breaks; parts of
    the types `image` and `video` only mark where an image or video goes; these themselves stand in the
    record.

    Source of the layout: huggingface.co/docs/trl/dataset_formats and
    huggingface.co/docs/transformers/chat_templating_multimodal.
    """
    return read_turns(messages, CHAT, what)


def from_turns(turns: Any, what: str) -> Turn:
    """Read a conversation of a column or key that may hold either layout: `from` marks a ShareGPT one."""
    first = turns[0] if isinstance(turns, list) and turns else None
    return read_turns(turns, LLAVA if isinstance(first, dict) and "from" in first else CHAT, what)


def from_fields(row: dict[str, Any], answer_field: str, answered: bool, what: str) -> Turn:
    """Read a LLaVA test record, `text` and an answer, or Video-ChatGPT's with `question`; see `answer_texts`.

    Sources of the layouts: github.com/haotian-liu/LLaVA, docs/Evaluation.md, and
    github.com/mbzuai-oryx/Video-ChatGPT, quantitative_evaluation.

    Args:
        row: the record.
        answer_field: the field with the answer.
        answered: whether the record has to hold the answer itself.
        what: the record, for the error's sentence.

    Raises:
        RecipeError: a field is missing or empty, or holds something else.
    """
    key = "text" if "text" in row else "question"
    if key not in row:
        raise RecipeError(
            f"{what} has neither 'conversations' nor 'text' and '{answer_field}'", "add one of them"
        )
    if answered and answer_field not in row:
        raise RecipeError(
            f"{what} has no '{answer_field}'",
            "add it, or name the field of the answer with 'source.answer' in the recipe",
        )
    if not isinstance(row[key], str):
        raise RecipeError(
            f"{what} has {described(row[key])} as its question, and a question is text",
            "correct or remove the record",
        )
    return Turn(row[key].strip(), answer_texts(row[answer_field], what) if answered else [])


def read_turns(turns: Any, layout: Layout, what: str) -> Turn:
    """Read a conversation: at most one system message, then questions and answers by turns.

    Args:
        turns: the value of the layout's key.
        layout: how it is written.
        what: the record, for the error's sentence.

    Raises:
        RecipeError: it is anything else, or does not end with an answer; the sentence says what.
    """
    if not isinstance(turns, list):
        raise RecipeError(
            f"{what} has {described(turns)} as its '{layout.name}', and not a list of turns",
            "correct the record",
        )
    if not turns:
        raise RecipeError(f"{what} has an empty list as its '{layout.name}'", "complete or remove the record")
    roles = [_role(turn, number, layout, what) for number, turn in enumerate(turns, start=1)]
    _check_order(roles, layout, what)
    *history, question, answer = [
        Message(role, _text(turn.get(layout.content), role, number, layout, what))
        for number, (turn, role) in enumerate(zip(turns, roles, strict=True), start=1)
    ]
    if history and history[0].role == "system" and is_blank(history[0].text):
        del history[0]
    for number, message in enumerate(history, start=1):
        if is_blank(message.text):
            raise RecipeError(
                f"{what} has an earlier {_kind(message.role)} that is empty (number {number} of the turns)",
                "complete or remove it",
            )
    return Turn(question.text, [answer.text], tuple(history))


def from_pairs(question: Any, answer: Any, history: Any, what: str) -> Turn:
    """Read a question, its answer and a list of earlier pairs, as Alpaca's and ms-swift's older records.

    Sources of the layout: `history` in github.com/hiyouga/LLaMA-Factory, data/README.md, and `query`,
    `response`, `history` in github.com/modelscope/ms-swift, docs/source_en/Customization/Custom-dataset.md.

    Args:
        question: what is asked.
        answer: what is learned.
        history: pairs of an earlier question and its answer, or nothing.
        what: the record, for the error's sentence.

    Raises:
        RecipeError: one of them is no text, or the history is no list of pairs.
    """
    pairs = [] if is_empty(history) else history
    if not isinstance(pairs, list):
        raise RecipeError(
            f"{what} has {described(pairs)} as its history, and not a list of pairs", "correct the record"
        )
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecipeError(
                f"{what} has {described(pair)} as number {number} of its history, which is no pair of a "
                "question and its answer",
                "correct the record",
            )
    texts = [text for pair in [*pairs, [question, answer]] for text in pair]
    words = [("user", "assistant")[i % 2] for i in range(len(texts))]
    turns = [{"role": word, "content": text} for word, text in zip(words, texts, strict=True)]
    return read_turns(turns, replace(CHAT, parts=False), what)


def refuse_objects(turn: Turn, row: dict[str, Any], what: str) -> None:
    """Refuse texts that ms-swift completes from a record's `objects`.

    Source: github.com/modelscope/ms-swift, docs/source_en/Customization/Custom-dataset.md, "Grounding".

    Raises:
        RecipeError: one has a place for an object or its box.
    """
    texts = " ".join([message.text for message in turn.history] + [turn.question, *turn.answers])
    marker = next((m for m in ("<ref-object>", "<bbox>") if m in texts), None)
    if marker and not is_empty(row.get("objects")):
        raise RecipeError(
            f"{what} has {marker} in its text, which only ms-swift fills from 'objects'",
            "write the object or its box in the text",
        )


def with_system(turn: Turn, system: str | None, what: str) -> Turn:
    """Return a conversation with the system message that its record has outside its turns.

    Raises:
        RecipeError: the conversation begins with another one.
    """
    if system is None:
        return turn
    message = Message("system", system.strip())
    if turn.history[:1] == (message,):
        return turn
    if turn.history and turn.history[0].role == "system":
        raise RecipeError(
            f"{what} has another system message in its conversation than as 'system'",
            "keep the one that is meant",
        )
    return replace(turn, history=(message, *turn.history))


def show_turn(
    turn: Turn, images: Sequence[Item], videos: Sequence[Sequence[Item]], what: str
) -> tuple[Turn, list[Item], Spans]:
    """Place the images and videos of a record in its conversation; see `place_videos`, `place_in_turns`.

    Returns:
        The conversation with its markers, its images and frames in order, and the spans of videos' frames.

    Raises:
        RecipeError: the questions have another number of markers, or another turn has one.
    """
    asked = [message.text for message in turn.history if message.role == "user"]
    (*earlier, question), shown, spans = place_videos([*asked, turn.question], images, videos, what)
    placed = replace(turn, question=question, history=replace_questions(turn.history, earlier))
    return place_turn(placed, len(shown), what), shown, spans


def place_turn(turn: Turn, images: int, what: str) -> Turn:
    """Place the images of a record in its conversation; see `place_in_turns`.

    Raises:
        RecipeError: the questions have another number of markers, or another turn has one.
    """
    for message in turn.history:
        if message.role != "user":
            refuse_marked(message.text, _kind(message.role), what)
    asked = [message.text for message in turn.history if message.role == "user"]
    *earlier, question = place_in_turns([*asked, turn.question], images, what)
    return replace(turn, question=question, history=replace_questions(turn.history, earlier))


def _check_order(roles: list[str], layout: Layout, what: str) -> None:
    """Refuse turns out of order; `roles` are those of `Message`."""
    start = int(roles[0] == "system")
    if "system" in roles[start:]:
        raise RecipeError(
            f"{what} has a system message as turn {roles.index('system', start) + 1}, and one may stand "
            "before the first question",
            "join it with the first turn, or remove it",
        )
    if len(roles) == start:
        raise RecipeError(f"{what} has a system message and no question", "complete or remove the record")
    if roles[start] == "assistant":
        raise RecipeError(
            f"{what} begins with an answer ('{layout.word('assistant')}')",
            "begin with the question, or remove the record",
        )
    for number, (role, following) in enumerate(zip(roles, roles[1:], strict=False), start=1):
        if role == following:
            raise RecipeError(
                f"{what} has two {_kind(role)}s in a row (turns {number} and {number + 1}, "
                f"'{layout.word(role)}')",
                "join or remove one of them",
            )
    if roles[-1] == "user":
        raise RecipeError(
            f"{what} ends with a question ('{layout.word('user')}') and has no answer to it",
            "add the answer, or remove the question",
        )


def _kind(role: str) -> str:
    return {"user": "question", "assistant": "answer", "system": "system message"}[role]


def _role(turn: Any, number: int, layout: Layout, what: str) -> str:
    """Return the role of a turn's speaker.

    Raises:
        RecipeError: the turn is no object, has another speaker or media, or is excluded from training.
    """
    if not isinstance(turn, dict):
        raise RecipeError(
            f"{what} has {described(turn)} as turn {number}, and not an object", "correct the record"
        )
    speaker = turn.get(layout.speaker)
    if not isinstance(speaker, str) or speaker not in layout.roles:
        asks, answers = layout.word("user"), layout.word("assistant")
        given = f"no '{layout.speaker}'" if speaker is None else f"{described(speaker)} as '{layout.speaker}'"
        raise RecipeError(
            f"{what} has {given} in turn {number}, which is neither '{asks}' nor '{answers}'",
            f"name the one who asks '{asks}' and the one who answers '{answers}'",
        )
    refuse_inner_media(turn, f"turn {number} of {what}")
    for key in LEARNED:
        if layout.roles[speaker] == "assistant" and turn.get(key) is not None and not turn[key]:
            raise RecipeError(
                f"turn {number} of {what} has {described(turn[key])} as '{key}', and every answer is learned",
                "split the record so that its last answer alone is learned, or remove the key",
            )
    return layout.roles[speaker]


def _text(content: Any, role: str, number: int, layout: Layout, what: str) -> str:
    """Return a turn's text, with a marker for every part that is an image or a video.

    Raises:
        RecipeError: the content is neither text nor, in a layout that has them, a list of valid parts.
    """
    if layout.parts and not isinstance(content, str):
        if not isinstance(content, list) or not content or not all(isinstance(p, dict) for p in content):
            raise RecipeError(
                f"{what} has a message with {described(content)} as its content, which is neither text nor "
                "parts",
                "correct its 'content', or remove the record",
            )
        content = "\n".join(_part(part, what) for part in content)
    if not isinstance(content, str):
        raise RecipeError(
            f"{what} has {described(content)} as its {_kind(role)}, and a conversation is text "
            f"(turn {number})",
            "put quotes around it, or remove the record",
        )
    return content if role == "assistant" else content.strip()


def _part(part: dict[str, Any], what: str) -> str:
    kind = part.get("type")
    if kind not in ("text", "image", "video"):
        raise RecipeError(
            f"{what} has a part of the type {kind!r}, which is not read",
            "use the types text, image and video",
        )
    if kind == "text" and not isinstance(part.get("text"), str):
        raise RecipeError(f"{what} has a part of the type 'text' without text", "add it, or remove the part")
    refuse_inner_media(part, f"a message of {what}")
    return {"text": (part.get("text") or "").strip(), "image": MARKER, "video": VIDEO_MARKER}[kind]
