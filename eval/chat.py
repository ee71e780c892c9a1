"""A conversation as a vision-language model sees it: chat text, token ids, and what of it is learned.

Chat texts are written by the checkpoint's template and turned into ids by the processor's own call,
whatever the model.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from llava_keeplora_eval.chat_text import PROBE, given_videos, mark_of, render, takes_suffix, takes_videos
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.image_inputs import TOKEN_KEYS, ImageShapes, blank_image
from llava_keeplora_eval.video_inputs import Times, VideoShapes, blank_video, metadata
from llava_keeplora_recipes import Recipe
from llava_keeplora_recipes.placeholders import MARKER
from llava_keeplora_recipes.records import Message, Spans
from llava_keeplora_recipes.videos import frame_time

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """A conversation up to a question, and the answer to it, as a generative model gets them.

    Args:
        prompt: token ids up to where the answer begins, image tokens included.
        reply: token ids of the answer and of the end of a turn, all of them learned; empty where the question
            is only asked.
        earlier: of each earlier answer that is learned too, where it begins and ends among the ids of
            `prompt`.
        extra: the other inputs that the model takes for each token of both, by key.
    """

    prompt: list[int]
    reply: list[int] = field(default_factory=list)
    earlier: tuple[tuple[int, int], ...] = ()
    extra: Mapping[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.reply)

    @property
    def learned_spans(self) -> tuple[tuple[int, int], ...]:
        """Where each answer that is learned begins and ends among the ids of both."""
        return *self.earlier, (len(self.prompt), len(self))

    @property
    def learned(self) -> int:
        """The number of tokens that are learned."""
        return sum(end - start for start, end in self.learned_spans)


def question_text(recipe: Recipe, question: str | None) -> str:
    """Return the question to a generative model: the example's, or the recipe's `prompt` if it has none."""
    return recipe.vlm_prompt if question is None else question


def training_answers(recipe: Recipe, answers: Sequence[str]) -> list[str]:
    """Return the answers of an example that training uses: all captions, or the most frequent answer."""
    if recipe.kind == "captioning":
        return list(answers)
    if recipe.kind == "classification":
        return [answers[0].replace("_", " ")]
    return [Counter(answers).most_common(1)[0][0]]


def image_inputs(processor, images: Sequence, videos: Spans = ()) -> dict[str, Tensor]:
    """Return what the model takes for one example's images, by key; nothing where it has none.

    Everything that the processor returns but the inputs of tokens: `pixel_values`, and what the model needs
    to know of them (`image_grid_thw`, `image_sizes`, `pixel_attention_mask`, `pixel_values_videos`, ...).

    Args:
        processor: of a vision-language model.
        images: the images, frames of videos included.
        videos: spans of the frames of each video among them; see `given_videos`.

    Raises:
        EvalError: the processor refuses the images.
    """
    if not images:
        return {}
    videos = given_videos(processor, len(images), videos)
    text = render(processor, "", len(images), videos=videos)
    try:
        media = _separate(images, videos, [frame_time(image) for image in images])
        made = processor(text=[text], **media, return_tensors="pt")
    except (ValueError, TypeError, IndexError) as error:
        raise EvalError(
            f"the model's processor refuses the images of an example ({str(error).splitlines()[0][:200]})",
            "check the image, or the processor's files",
        ) from error
    return {key: value for key, value in made.items() if key not in (*TOKEN_KEYS, "labels")}


def _separate(images: Sequence, videos: Spans, times: Times) -> dict[str, Any]:
    """Return the arguments of a processor for an example's images and videos; see `Chat.prompt`."""
    frames = {i for start, end in videos for i in range(start, end)}
    alone = [image for i, image in enumerate(images) if i not in frames]
    # Nested where the number of images makes a difference.
    media: dict[str, Any] = {"images": [alone] if alone else None}
    if videos:
        media["videos"] = [list(images[start:end]) for start, end in videos]
        media["video_metadata"] = [metadata(end - start, list(times[start:end])) for start, end in videos]
    return media


class Chat:
    """Conversations as token ids; training and generation both take theirs from here.

    Args:
        processor: of a vision-language model.
    """

    def __init__(self, processor):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._by_size = copy.copy(processor)
        self._by_size.image_processor = ImageShapes(processor.image_processor)
        if takes_videos(processor):
            self._by_size.video_processor = VideoShapes.of(processor.video_processor)
        self._special = _special_tokens(processor)
        self._asked: tuple[Any, list[int]] = (None, [])
        self.pad_id = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self.tokenizer.eos_token_id
        )

    @cached_property
    def image_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for images and videos, begin, break and end tokens included."""
        ids = getattr(self.processor, "image_token_ids", None) or [self.processor.image_token_id]
        if takes_videos(self.processor):
            ids = [*ids, *self.processor.video_token_ids]
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def answer_frame(self) -> tuple[str, str]:
        """What the chat template writes between its generation prompt and an answer, and what ends the turn.

        The end is the special token that follows an answer. Where none does, or the template writes no
        answers, it is the tokenizer's end of text.
        """
        prompt = render(self.processor, "q", 0)
        try:
            whole = render(self.processor, "q", 0, answer=PROBE)
        except EvalError:  # A template for questions alone.
            whole = ""
        lead, found, tail = (
            whole[len(prompt) :].partition(PROBE) if whole.startswith(prompt) else ("", "", "")
        )
        if not found or lead.strip():
            lead = "" if prompt[-1:].isspace() else " "
        end = self._special.match(tail.lstrip())
        if end is None:
            return lead, self.tokenizer.eos_token
        return lead, tail[: len(tail) - len(tail.lstrip())] + end[0]

    @property
    def end_ids(self) -> set[int]:
        """Ids of the tokens that end an answer: the template's, and the tokenizer's end of text."""
        end = self.tokenizer.convert_tokens_to_ids(self.answer_frame[1].strip())
        return {i for i in (end, self.tokenizer.eos_token_id) if i is not None}

    def prompt(
        self,
        question: str,
        sizes: Sequence[tuple[int, int]],
        history: Sequence[Message] = (),
        videos: Spans = (),
        times: Times = (),
    ) -> Encoding:
        """Encode a question, with as many placeholders per image as the model has features for it.

        Args:
            question: what is asked.
            sizes: (height, width) of each image, frames of videos included.
            history: the turns before it.
            videos: spans of the frames of each video among the images; see `given_videos`.
            times: of each image, its time in its video and the video's length, or None; see `frame_time`.

        Raises:
            EvalError: a text holds a special token of the tokenizer or marks another number of images, or the
                processor refuses them.
        """
        self._refuse_special(question, history)
        videos = given_videos(self.processor, len(sizes), videos)
        text = render(self.processor, question, len(sizes), history, videos=videos)
        tokens = self._encode(text, sizes, videos, times)
        return Encoding(prompt=tokens.pop("input_ids"), extra=tokens)

    def turn(
        self,
        question: str,
        sizes: Sequence[tuple[int, int]],
        answer: str,
        history: Sequence[Message] = (),
        videos: Spans = (),
        times: Times = (),
    ) -> Encoding:
        """Encode a question and its answer with the end of the turn, and find the earlier answers.

        Args:
            question, sizes, history, videos, times: see `prompt`.
            answer: the text to learn.

        Raises:
            EvalError: as `prompt`, and if the tokenizer does not keep the prompt apart from the answer, so
                that training would show the model another prompt than generation does.
        """
        self._refuse_special(question, history, answer)
        videos = given_videos(self.processor, len(sizes), videos)
        text = render(self.processor, question, len(sizes), history, videos=videos)
        # An image's captions follow each other, and their prompt is the same.
        asked = (text, list(sizes), videos, list(times))
        if self._asked[0] != asked:
            self._asked = asked, self._encode(text, sizes, videos, times)["input_ids"]
        prompt = self._asked[1]
        if takes_suffix(self.processor):
            tokens = self._encode(text, sizes, videos, times, suffix=[answer])
        else:
            lead, end = self.answer_frame
            tokens = self._encode(text + lead + answer + end, sizes, videos, times)
        whole = tokens.pop("input_ids")
        if whole[: len(prompt)] != prompt:
            raise EvalError(
                f"the tokenizer joins the end of the chat template with the answer '{answer}'",
                "end the chat template's generation prompt with a colon or a line break",
            )
        earlier = self._earlier(text, prompt, sizes, history, videos, times) if history else ()
        return Encoding(prompt=prompt, reply=whole[len(prompt) :], earlier=earlier, extra=tokens)

    def _earlier(
        self,
        text: str,
        ids: list[int],
        sizes: Sequence[tuple[int, int]],
        history: Sequence[Message],
        videos: Spans,
        times: Times,
    ) -> tuple[tuple[int, int], ...]:
        """Find the earlier answers of a chat text among its ids, by the lengths of its beginnings.

        Raises:
            EvalError: the template writes an earlier turn otherwise than the last one, so that the place of
                its answer is unknown.
        """
        lead, end = self.answer_frame
        marks = any(MARKER in turn.text for turn in history)
        spans = []
        for i, turn in enumerate(history):
            if turn.role != "assistant":
                continue
            before, question = history[: i - 1], history[i - 1].text
            image_count = sum(t.text.count(MARKER) for t in history[:i]) if marks else len(sizes)
            shown = tuple(span for span in videos if span[1] <= image_count)
            start = render(self.processor, question, image_count, before, videos=shown)
            stop = start + lead + turn.text
            stop += end if text.startswith(stop + end) else ""
            seen = (sizes[:image_count], shown, times)
            bounds = [self._encode(part, *seen)["input_ids"] for part in (start, stop)]
            if not text.startswith(stop) or any(ids[: len(part)] != part for part in bounds):
                raise EvalError(
                    f"the model's chat template writes the earlier answer '{shorten(turn.text, 80)}' "
                    "otherwise than a last one",
                    "train on single turns, or give a chat template that repeats turns as they were",
                )
            spans.append((len(bounds[0]), len(bounds[1])))
        return tuple(spans)

    def _refuse_special(self, question: str, history: Sequence[Message] = (), answer: str = "") -> None:
        """Refuse what the tokenizer would read as a token of its own, such as the end of the text."""
        texts = [("question", question.replace(MARKER, " ")), ("answer", answer)]
        texts += [(f"{turn.role} turn", turn.text.replace(MARKER, " ")) for turn in history]
        for role, text in texts:
            if special := self._special.search(text):
                raise EvalError(
                    f"the {role} '{shorten(text, 80)}' holds {special[0]}, a special token of the model",
                    "take it out of the text, or write it with spaces in it",
                )

    def _encode(
        self, text: str, sizes: Sequence[tuple[int, int]], videos: Spans, times: Times, **options: Any
    ) -> dict[str, list[int]]:
        """Return the processor's inputs for each token of a chat text, but for the attention mask."""
        # Some chat templates write the begin-of-text token that the tokenizer puts before every text too; it
        # goes there once.
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        media = _separate(sizes, videos, times)
        alone, given = (media["images"] or [[]])[0], media.get("videos", [])
        self._check_marks(text, "image", len(alone))
        if given:
            self._check_marks(text, "video", len(given))
        if any(len(set(frames)) > 1 for frames in given):
            raise EvalError(
                "the frames of a video have different sizes, and the model takes videos whole",
                "make the frames of each video of one size",
            )
        media["images"] = [[blank_image(*size) for size in alone]] if alone else None
        if given:
            media["videos"] = [blank_video(len(frames), *frames[0]) for frames in given]
        try:
            made = self._by_size(text=[text], **media, add_special_tokens=not begun, **options)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise EvalError(
                f"the model's processor refuses a question with {len(sizes)} images "
                f"({str(error).splitlines()[0][:200] if str(error) else type(error).__name__})",
                "check that the processor's files and the model's config.json are of one checkpoint",
            ) from error
        return {
            key: list(map(int, made[key][0])) for key in TOKEN_KEYS if key in made and key != "attention_mask"
        }

    def _check_marks(self, text: str, kind: str, count: int) -> None:
        """Refuse a chat text that holds another number of tokens of images or videos than there are."""
        token = mark_of(self.processor, kind)
        if (marked := text.count(token)) != count:
            raise EvalError(
                f"a question has {count} {kind}s and its chat text marks {marked} with {token}",
                "remove the mark from the text of the question, the prompt or the chat template",
            )


def _special_tokens(processor) -> re.Pattern[str]:
    """Return the pattern of all texts that the tokenizer reads as special tokens anywhere in a text."""
    tokenizer = processor.tokenizer
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    words = {*added, *tokenizer.all_special_tokens, processor.image_token} - {""}
    words |= {processor.video_token} if takes_videos(processor) else set()
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))
