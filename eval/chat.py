"""A conversation as a vision-language model sees it: chat text, token ids, and what of it is learned.

Chat texts are written by the checkpoint's template and turned into ids by the processor's own call,
whatever the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from llava_keeplora_eval.chat_text import PROBE, given_videos, render, takes_suffix, takes_videos
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.image_inputs import TOKEN_KEYS
from llava_keeplora_eval.processor_calls import ChatText, TokenCalls, Tokens, separate
from llava_keeplora_eval.video_inputs import Times
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
        media = separate(images, videos, [frame_time(image) for image in images])
        made = processor(text=[text], **media, return_tensors="pt")
    except (ValueError, TypeError, IndexError) as error:
        raise EvalError(
            f"the model's processor refuses the images of an example ({str(error).splitlines()[0][:200]})",
            "check the image, or the processor's files",
        ) from error
    return {key: value for key, value in made.items() if key not in (*TOKEN_KEYS, "labels")}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question to a generative model.

    Args:
        question: what is asked.
        sizes: (height, width) of each image, frames of videos included.
        answer: the text to learn; None where the question is only asked.
        history: the turns before it.
        videos: spans of the frames of each video among the images; see `given_videos`.
        times: of each image, its time in its video and the video's length, or None; see `frame_time`.
    """

    question: str
    sizes: Sequence[tuple[int, int]]
    answer: str | None = None
    history: Sequence[Message] = ()
    videos: Spans = ()
    times: Times = ()


@dataclass(frozen=True)
class _Texts:
    """The chat texts of a question.

    Args:
        prompt: up to where the answer begins.
        whole: with the answer and the end of the turn, if it is learned.
        answer: this answer.
        earlier: of each earlier answer its text, the text before it and the text with it.
    """

    prompt: ChatText
    whole: ChatText | None = None
    answer: str = ""
    earlier: Sequence[tuple[str, ChatText, ChatText]] = ()

    def __iter__(self) -> Iterator[ChatText]:
        yield from (text for text in (self.prompt, self.whole) if text)
        yield from (text for _, *pair in self.earlier for text in pair)


class Chat:
    """Conversations as token ids; training and generation both take theirs from here.

    Args:
        processor: of a vision-language model.
    """

    def __init__(self, processor):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._calls = TokenCalls(processor)
        self._special = _special_tokens(processor)
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
            question, sizes, history, videos, times: see `Asked`.

        Raises:
            EvalError: see `encode`.
        """
        asked = Asked(question=question, sizes=sizes, history=history, videos=videos, times=times)
        return self._one(asked)

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
            question, sizes, answer, history, videos, times: see `Asked`.

        Raises:
            EvalError: see `encode`.
        """
        return self._one(
            Asked(question=question, sizes=sizes, answer=answer, history=history, videos=videos, times=times)
        )

    def _one(self, asked: Asked) -> Encoding:
        (encoding,) = self.encode([asked])
        if isinstance(encoding, EvalError):
            raise encoding
        return encoding

    def encode(self, questions: Sequence[Asked]) -> list[Encoding | EvalError]:
        """Encode questions, and answers that are learned with the end of their turns.

        Returns:
            of each its encoding, or an error: a text holds a special token of the tokenizer or marks another
            number of images; the processor refuses it; the tokenizer does not keep the prompt apart from the
            answer, so that training would show the model another prompt than generation does; the template
            writes an earlier turn otherwise than the last one, so that the place of its answer is unknown.
        """
        written = [_result(self._texts, asked) for asked in questions]
        tokens = self._calls.encode(
            text for texts in written if not isinstance(texts, EvalError) for text in texts
        )
        return [
            texts if isinstance(texts, EvalError) else _result(self._encoding, texts, tokens)
            for texts in written
        ]

    def _texts(self, asked: Asked) -> _Texts:
        """Write the chat texts of a question.

        Raises:
            EvalError: see `encode`.
        """
        self._refuse_special(asked.question, asked.history, asked.answer or "")
        sizes, times = tuple(asked.sizes), tuple(asked.times)
        videos = given_videos(self.processor, len(sizes), asked.videos)
        text = render(self.processor, asked.question, len(sizes), asked.history, videos=videos)
        prompt = ChatText(text, sizes, videos, times)
        if asked.answer is None:
            return _Texts(prompt)
        if takes_suffix(self.processor):
            whole = replace(prompt, suffix=asked.answer)
        else:
            lead, end = self.answer_frame
            whole = replace(prompt, text=text + lead + asked.answer + end)
        return _Texts(prompt, whole, asked.answer, list(self._earlier(prompt, asked.history)))

    def _earlier(
        self, whole: ChatText, history: Sequence[Message]
    ) -> Iterator[tuple[str, ChatText, ChatText]]:
        """Yield the earlier answers of a chat text, each with its beginnings before and with it.

        Raises:
            EvalError: the template writes an earlier turn otherwise than the last one.
        """
        lead, end = self.answer_frame
        marks = any(MARKER in turn.text for turn in history)
        for i, turn in enumerate(history):
            if turn.role != "assistant":
                continue
            before, question = history[: i - 1], history[i - 1].text
            image_count = sum(t.text.count(MARKER) for t in history[:i]) if marks else len(whole.sizes)
            shown = tuple(span for span in whole.videos if span[1] <= image_count)
            start = render(self.processor, question, image_count, before, videos=shown)
            stop = start + lead + turn.text
            stop += end if whole.text.startswith(stop + end) else ""
            if not whole.text.startswith(stop):
                raise _rewritten(turn.text)
            beginning = replace(whole, sizes=whole.sizes[:image_count], videos=shown)
            yield turn.text, replace(beginning, text=start), replace(beginning, text=stop)

    def _encoding(self, texts: _Texts, tokens: Mapping[ChatText, Tokens | EvalError]) -> Encoding:
        """Join the tokens of a question's chat texts.

        Raises:
            EvalError: see `encode`.
        """

        def ids(text: ChatText) -> list[int]:
            if isinstance(made := tokens[text], EvalError):
                raise made
            return made["input_ids"]

        prompt, whole = ids(texts.prompt), ids(texts.whole or texts.prompt)
        if texts.whole and whole[: len(prompt)] != prompt:
            raise EvalError(
                f"the tokenizer joins the end of the chat template with the answer '{texts.answer}'",
                "end the chat template's generation prompt with a colon or a line break",
            )
        spans = []
        for answer, *pair in texts.earlier:
            bounds = [ids(text) for text in pair]
            if any(prompt[: len(part)] != part for part in bounds):
                raise _rewritten(answer)
            spans.append((len(bounds[0]), len(bounds[1])))
        made = tokens[texts.whole or texts.prompt]
        assert not isinstance(made, EvalError)
        extra = {key: value for key, value in made.items() if key != "input_ids"}
        return Encoding(prompt=prompt, reply=whole[len(prompt) :], earlier=tuple(spans), extra=extra)

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


def _result(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns, or the EvalError that it raises."""
    try:
        return function(*arguments)
    except EvalError as error:
        return error


def _rewritten(answer: str) -> EvalError:
    return EvalError(
        f"the model's chat template writes the earlier answer '{shorten(answer, 80)}' otherwise than a last "
        "one",
        "train on single turns, or give a chat template that repeats turns as they were",
    )


def _special_tokens(processor) -> re.Pattern[str]:
    """Return the pattern of all texts that the tokenizer reads as special tokens anywhere in a text."""
    tokenizer = processor.tokenizer
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    words = {*added, *tokenizer.all_special_tokens, processor.image_token} - {""}
    words |= {processor.video_token} if takes_videos(processor) else set()
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))
