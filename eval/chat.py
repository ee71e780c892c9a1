"""A conversation as a vision-language model sees it: chat text, token ids, and what of it is learned.

Chat texts are written by the checkpoint's template and turned into ids by the processor's own call,
whatever the model.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.image_inputs import TOKEN_KEYS, ImageShapes, blank_image
from llava_keeplora_recipes import Recipe
from llava_keeplora_recipes.placeholders import MARKER
from llava_keeplora_recipes.records import Message

if TYPE_CHECKING:
    from torch import Tensor

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
_PROBE = "Xqzj"


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


def render(
    processor, question: str, n_images: int, history: Sequence[Message] = (), answer: str | None = None
) -> str:
    """Write the chat text of a conversation, up to where the answer to its last question begins.

    Args:
        processor: of a vision-language model; its chat template is used, or `VICUNA_V1` where it has none.
        question: what is asked; with a marker for each image where they have places in it.
        n_images: how many images there are; they go before the first question where no text marks places.
        history: the turns before the question; their texts may mark places of images too.
        answer: the answer, which then ends the text as the template ends a turn.

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
    ahead = 0 if marked else n_images
    messages = []
    for turn in turns:
        messages.append({"role": turn.role, "content": _content(processor, turn, ahead)})
        ahead = 0 if turn.role == "user" else ahead
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return _apply(processor, messages, answer is None)


def _content(processor, turn: Message, ahead: int) -> list[dict[str, str]]:
    """Return a turn's parts: `ahead` images, then its text with the images in their places."""
    images = [{"type": "image"}] * ahead * (turn.role == "user")
    if MARKER not in turn.text:
        return [*images, {"type": "text", "text": turn.text}]
    if takes_suffix(processor):
        raise EvalError(
            "the model takes images before the text only, and a question marks them between words",
            "mark no images (they go before the question then), or take another model",
        )
    if _writes_bare_token(processor):
        # Such templates may put parts of the type image before the text, wherever they stand among the parts.
        return [*images, {"type": "text", "text": turn.text.replace(MARKER, processor.image_token)}]
    parts: list[dict[str, str]] = []
    for i, text in enumerate(turn.text.split(MARKER)):
        parts += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": text}] * bool(text)
    probes = [
        {"type": "text", "text": f"{_PROBE}{i}"} if "text" in part else part for i, part in enumerate(parts)
    ]
    _check_places(processor, probes)
    return parts


def takes_suffix(processor) -> bool:
    """Return whether a processor itself joins a question with its answer, as PaliGemma's does."""
    return "suffix" in _call_parameters(type(processor))


@cache  # Asked for every example.
def _call_parameters(processor_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(processor_class.__call__).parameters)


def _check_places(processor, parts: Sequence[Mapping[str, str]]) -> None:
    """Refuse a template that writes images elsewhere than where they stand among a turn's parts."""
    text = _apply(processor, [{"role": "user", "content": list(parts)}], True)
    words = [part.get("text", processor.image_token) for part in parts]
    place = 0
    for word in words:
        place = text.find(word, place) + len(word)
        if place < len(word):
            raise EvalError(
                "the model's chat template does not keep images between words, where a question marks them",
                "mark no images (they go before the question then), or take another model",
            )


def _writes_bare_token(processor) -> bool:
    """Return whether a chat template writes only the image token, and white space, for an image."""
    text = {"type": "text", "text": _PROBE}
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


def image_inputs(processor, images: Sequence) -> dict[str, Tensor]:
    """Return what the model takes for one example's images, by key; nothing where it has none.

    Everything that the processor returns but the inputs of tokens: `pixel_values`, and what the model needs
    to know of them (`image_grid_thw`, `image_sizes`, `pixel_attention_mask`, ...).

    Raises:
        EvalError: the processor refuses the images.
    """
    if not images:
        return {}
    try:
        # Nested where the number of images makes a difference.
        made = processor(
            text=[render(processor, "", len(images))], images=[list(images)], return_tensors="pt"
        )
    except (ValueError, TypeError, IndexError) as error:
        raise EvalError(
            f"the model's processor refuses the images of an example ({str(error).splitlines()[0][:200]})",
            "check the image, or the processor's files",
        ) from error
    return {key: value for key, value in made.items() if key not in (*TOKEN_KEYS, "labels")}


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
        self._special = _special_tokens(processor)
        self.pad_id = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self.tokenizer.eos_token_id
        )

    @cached_property
    def image_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for images, begin, break and end tokens included."""
        ids = getattr(self.processor, "image_token_ids", None) or [self.processor.image_token_id]
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def answer_frame(self) -> tuple[str, str]:
        """What the chat template writes between its generation prompt and an answer, and what ends the turn.

        The end is the special token that follows an answer. Where none does, or the template writes no
        answers, it is the tokenizer's end of text.
        """
        prompt = render(self.processor, "q", 0)
        try:
            whole = render(self.processor, "q", 0, answer=_PROBE)
        except EvalError:  # A template for questions alone.
            whole = ""
        lead, found, tail = (
            whole[len(prompt) :].partition(_PROBE) if whole.startswith(prompt) else ("", "", "")
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
        self, question: str, sizes: Sequence[tuple[int, int]], history: Sequence[Message] = ()
    ) -> Encoding:
        """Encode a question, with as many placeholders per image as the model has features for it.

        Args:
            question: what is asked.
            sizes: (height, width) of each image.
            history: the turns before it.

        Raises:
            EvalError: a text holds a special token of the tokenizer or marks another number of images, or the
                processor refuses them.
        """
        self._refuse_special(question, history)
        tokens = self._encode(render(self.processor, question, len(sizes), history), sizes)
        return Encoding(prompt=tokens.pop("input_ids"), extra=tokens)

    def turn(
        self,
        question: str,
        sizes: Sequence[tuple[int, int]],
        answer: str,
        history: Sequence[Message] = (),
    ) -> Encoding:
        """Encode a question and its answer with the end of the turn, and find the earlier answers.

        Args:
            question, sizes, history: see `prompt`.
            answer: the text to learn.

        Raises:
            EvalError: as `prompt`, and if the tokenizer does not keep the prompt apart from the answer, so
                that training would show the model another prompt than generation does.
        """
        self._refuse_special(question, history, answer)
        text = render(self.processor, question, len(sizes), history)
        prompt = self._encode(text, sizes)["input_ids"]
        if takes_suffix(self.processor):
            tokens = self._encode(text, sizes, suffix=[answer])
        else:
            lead, end = self.answer_frame
            tokens = self._encode(text + lead + answer + end, sizes)
        whole = tokens.pop("input_ids")
        if whole[: len(prompt)] != prompt:
            raise EvalError(
                f"the tokenizer joins the end of the chat template with the answer '{answer}'",
                "end the chat template's generation prompt with a colon or a line break",
            )
        earlier = self._earlier(text, prompt, sizes, history) if history else ()
        return Encoding(prompt=prompt, reply=whole[len(prompt) :], earlier=earlier, extra=tokens)

    def _earlier(
        self, text: str, ids: list[int], sizes: Sequence[tuple[int, int]], history: Sequence[Message]
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
            start = render(self.processor, question, image_count, before)
            stop = start + lead + turn.text
            stop += end if text.startswith(stop + end) else ""
            bounds = [self._encode(part, sizes[:image_count])["input_ids"] for part in (start, stop)]
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

    def _encode(self, text: str, sizes: Sequence[tuple[int, int]], **options: Any) -> dict[str, list[int]]:
        """Return the processor's inputs for each token of a chat text, but for the attention mask."""
        # Some chat templates write the begin-of-text token that the tokenizer puts before every text too; it
        # goes there once.
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        marked = text.count(self.processor.image_token)
        if marked != len(sizes):
            raise EvalError(
                f"a question has {len(sizes)} images and its chat text marks {marked} with "
                f"{self.processor.image_token}",
                "remove the mark from the text of the question, the prompt or the chat template",
            )
        images = [[blank_image(*size) for size in sizes]] if sizes else None
        try:
            made = self._by_size(text=[text], images=images, add_special_tokens=not begun, **options)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise EvalError(
                f"the model's processor refuses a question with {len(sizes)} images "
                f"({str(error).splitlines()[0][:200] if str(error) else type(error).__name__})",
                "check that the processor's files and the model's config.json are of one checkpoint",
            ) from error
        return {
            key: list(map(int, made[key][0])) for key in TOKEN_KEYS if key in made and key != "attention_mask"
        }


def _special_tokens(processor) -> re.Pattern[str]:
    """Return the pattern of all texts that the tokenizer reads as special tokens anywhere in a text."""
    tokenizer = processor.tokenizer
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    words = {*added, *tokenizer.all_special_tokens, processor.image_token} - {""}
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))
