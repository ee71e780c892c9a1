"""Chat texts of conversations, as a checkpoint's template writes them, with places for images and videos."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import islice
from textwrap import shorten
from typing import Any

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.video_inputs import PillowVideos
from llava_keeplora_recipes.placeholders import MARKER
from llava_keeplora_recipes.records import Message, Spans

#: For checkpoints without a chat template: LLaVA-1.5's own (conversation `v1` of
#: github.com/haotian-liu/LLaVA).
VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
    "{% for message in messages %} {{ message['role'].upper() }}: "
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>\n{% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{{ eos_token if message['role'] == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)

# A word that no template writes, to see what a template writes around it.
PROBE = "Xqzj"


def render(
    processor,
    question: str,
    n_images: int,
    history: Sequence[Message] = (),
    answer: str | None = None,
    videos: Spans = (),
) -> str:
    """Write the chat text of a conversation, up to where the answer to its last question begins.

    Args:
        processor: of a vision-language model; its chat template is used, or `VICUNA_V1` where it has none.
        question: what is asked; with a marker for each image where they have places in it.
        n_images: how many images there are, frames of videos included; they go before the first question
            where no text marks places.
        history: the turns before the question; their texts may mark places of images too.
        answer: the answer, which then ends the text as the template ends a turn.
        videos: spans of images that are the frames of a video each, see `given_videos`; their markers are
            the place of the video.

    Raises:
        EvalError: the texts mark another number of images, the template fails, or it moves images from their
            places.
    """
    turns = [*history, Message("user", question)]
    marked = sum(turn.text.count(MARKER) for turn in turns)
    if marked not in (0, n_images):
        raise EvalError(
            f"the question '{shorten(question, 80)}' marks {marked} images and has {n_images}",
            "mark each image once, or none",
        )
    media = iter(_media(n_images, videos))
    messages = []
    for turn in turns:
        ahead = media if not marked and turn.role == "user" else ()
        messages.append({"role": turn.role, "content": _content(processor, turn, ahead, media)})
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return _apply(processor, messages, answer is None)


def _media(n_images: int, videos: Spans) -> list[str | None]:
    """Return for each image whether it is an `image` or begins a `video`; None for a video's other frames."""
    media: list[str | None] = ["image"] * n_images
    for start, end in videos:
        media[start:end] = ["video", *[None] * (end - start - 1)]
    return media


def _content(
    processor, turn: Message, ahead: Iterable[str | None], marks: Iterable[str | None]
) -> list[dict[str, str]]:
    """Return a turn's parts: the media ahead of it, then its text with those of its markers in their places.

    Args:
        processor: see `render`.
        turn: the turn.
        ahead, marks: see `_media`; of both as many are taken as there are places.
    """
    before = [{"type": kind} for kind in ahead if kind]
    if MARKER not in turn.text:
        return [*before, {"type": "text", "text": turn.text}]
    if takes_suffix(processor):
        raise EvalError(
            "the model takes images before the text only, and a question marks them between words",
            "mark no images (they go before the question then), or take another model",
        )
    parts = _marked_parts(turn.text, islice(marks, turn.text.count(MARKER)))
    if _writes_bare_token(processor, processor.chat_template):
        # Such templates may put parts of the type image before the text, wherever they stand among the parts.
        return [*before, {"type": "text", "text": "".join(_words(processor, parts))}]
    _check_places(processor, processor.chat_template, tuple(part["type"] for part in parts))
    return parts


def _marked_parts(text: str, marks: Iterable[str | None]) -> list[dict[str, str]]:
    """Return the parts of a text with markers: words, images and videos.

    Raises:
        EvalError: words stand between the markers of a video's frames.
    """
    first, *rest = text.split(MARKER)
    parts = [{"type": "text", "text": first}]
    for kind, words in zip(marks, rest):
        if kind:
            parts.append({"type": kind})
        elif parts.pop()["text"].strip():
            raise EvalError(
                f"the question '{shorten(text, 80)}' has words between the frames of a video, and the model "
                "takes videos whole",
                "mark the video once, with <video>",
            )
        parts.append({"type": "text", "text": words})
    return [part for part in parts if part.get("text") != ""]


def _words(processor, parts: Sequence[Mapping[str, str]]) -> list[str]:
    """Return parts as a template writes them that marks images and videos by their tokens alone."""
    return [part.get("text") or mark_of(processor, part["type"]) for part in parts]


def mark_of(processor, kind: str) -> str:
    """Return the token that marks an `image` or a `video` in a chat text."""
    return processor.video_token if kind == "video" else processor.image_token


def given_videos(processor, n_images: int, videos: Spans) -> Spans:
    """Return the spans of frames that a processor gets as videos; the others are images to it.

    All of an example's videos are, if the processor takes videos of so few frames (Qwen3-VL's: two at the
    least), the chat template writes them, and, where images and videos have the same keys among the model's
    inputs (SmolVLM), the example has no image.

    Args:
        processor: of a vision-language model.
        n_images: how many images an example has, frames included.
        videos: spans of its videos' frames.
    """
    if not videos or not takes_videos(processor):
        return ()
    counts = [end - start for start, end in videos]
    if min(counts) < processor.video_processor.fewest_frames:
        return ()
    alone = n_images == sum(counts)
    return videos if alone or not processor.video_processor.layout.replaces_images else ()


def takes_videos(processor) -> bool:
    """Return whether a processor takes videos, and its chat template writes them."""
    videos = getattr(processor, "video_processor", None)
    return isinstance(videos, PillowVideos) and _writes_videos(processor, processor.chat_template)


@lru_cache(maxsize=8)  # Asked for every example.
def _writes_videos(processor, template: str) -> bool:
    parts = [{"type": "video"}, {"type": "text", "text": PROBE}]
    return _apply(processor, [{"role": "user", "content": parts}], True).count(processor.video_token) == 1


def takes_suffix(processor) -> bool:
    """Return whether a processor itself joins a question with its answer, as PaliGemma's does."""
    return "suffix" in _call_parameters(type(processor))


@cache  # Asked for every example.
def _call_parameters(processor_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(processor_class.__call__).parameters)


@lru_cache(maxsize=256)
def _check_places(processor, template: str | None, kinds: tuple[str, ...]) -> None:
    """Refuse a template that writes images elsewhere than where they stand among a turn's parts.

    Args:
        processor: see `render`.
        template: its chat template, on which the outcome depends.
        kinds: the types of the parts.
    """
    parts = [
        {"type": "text", "text": f"{PROBE}{i}"} if k == "text" else {"type": k} for i, k in enumerate(kinds)
    ]
    text = _apply(processor, [{"role": "user", "content": parts}], True)
    place = 0
    for word in _words(processor, parts):
        place = text.find(word, place) + len(word)
        if place < len(word):
            raise EvalError(
                "the model's chat template does not keep images between words, where a question marks them",
                "mark no images (they go before the question then), or take another model",
            )


@lru_cache(maxsize=8)
def _writes_bare_token(processor, template: str | None) -> bool:
    """Return whether a chat template writes only the image token, and white space, for an image."""
    text = {"type": "text", "text": PROBE}
    without = _apply(processor, [{"role": "user", "content": [text]}], True)
    with_image = _apply(processor, [{"role": "user", "content": [{"type": "image"}, text]}], True)
    common = next((i for i, (a, b) in enumerate(zip(without, with_image)) if a != b), len(without))
    written = with_image[common : common + len(with_image) - len(without)]
    return written.strip() in (processor.image_token, "")


def _apply(processor, messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
    template = processor.chat_template or VICUNA_V1.replace("<image>", processor.image_token)
    try:
        return processor.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=generation_prompt, tokenize=False
        )
    except Exception as error:  # A template is a program: it may fail in any way.
        raise EvalError(
            "the model's chat template fails "
            f"({str(error).splitlines()[0][:200] if str(error) else type(error).__name__})",
            "restore the checkpoint's chat_template.jinja, or the chat_template of its tokenizer_config.json",
        ) from error
