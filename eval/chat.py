"""A question as a LLaVA model sees it: its chat text, its token ids, and where the answer begins."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_recipes.placeholders import MARKER

if TYPE_CHECKING:
    from llava_keeplora_recipes import Recipe

#: For checkpoints without a chat template: LLaVA-1.5's own (conversation `v1` of
#: github.com/haotian-liu/LLaVA).
VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
    "{% for message in messages %} {{ message['role'].upper() }}: "
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>\n{% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def render(processor, question: str, n_images: int) -> str:
    """The chat text of one question, up to where the answer begins.

    Args:
        processor: a LLaVA processor; its chat template is used, or `VICUNA_V1` where it has none.
        question: what is asked; with a marker for each image where they have places in it.
        n_images: how many images there are; they go before a question without markers.

    Raises:
        EvalError: the question marks another number of images, or the template fails.
    """
    marked = question.count(MARKER)
    if marked not in (0, n_images):
        raise EvalError(
            f"the question '{shorten(question, 80)}' marks {marked} images and has {n_images}",
            "mark each image once, or none",
        )
    # Chat templates put parts of the type image before the text, wherever they stand among the parts.
    text = {"type": "text", "text": question.replace(MARKER, processor.image_token)}
    content = [text] if marked else [{"type": "image"}] * n_images + [text]
    template = processor.chat_template or VICUNA_V1.replace("<image>", processor.image_token)
    try:
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template,
            add_generation_prompt=True,
            tokenize=False,
        )
    except Exception as error:  # A template is a program: it may fail in any way.
        raise EvalError(
            "the model's chat template fails "
            f"({str(error).splitlines()[0][:200] if str(error) else type(error).__name__})",
            "restore the checkpoint's chat_template.jinja, or the chat_template of its tokenizer_config.json",
        ) from error


def question_text(recipe: Recipe, question: str | None) -> str:
    """What a generative model is asked: the example's question, or the recipe's own where there is none."""
    return recipe.vlm_prompt if question is None else question


def training_answers(recipe: Recipe, answers: Sequence[str]) -> list[str]:
    """The answers of an example that are trained on.

    Every caption, otherwise the one that is given most often.
    """
    if recipe.kind == "captioning":
        return list(answers)
    if recipe.kind == "classification":
        return [answers[0].replace("_", " ")]
    return [Counter(answers).most_common(1)[0][0]]


def reply(processor, prompt: str, answer: str) -> str:
    """How an answer goes on from the chat text of its question, with the end-of-text token."""
    return ("" if prompt[-1:].isspace() else " ") + answer + processor.tokenizer.eos_token


def cuts_into_tiles(processor, n_images: int) -> bool:
    """Whether an example's images are cut into tiles: LLaVA-OneVision does so with a lone image only."""
    return n_images == 1 or "batch_num_images" not in processor.image_processor.model_input_names


class Chat:
    """Questions and answers as token ids; training and generation both take theirs from here.

    Args:
        processor: a LLaVA processor.
    """

    def __init__(self, processor):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        self._special = _special_tokens(processor)
        self.pad_id = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self.tokenizer.eos_token_id
        )

    def prompt(self, question: str, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Token ids of a question, with as many placeholders per image as the model has features for it.

        Args:
            question: what is asked.
            sizes: (height, width) of each image.

        Raises:
            EvalError: the question holds a special token of the tokenizer, or marks another number of images.
        """
        self._refuse_special(question)
        return self._expand(self._tokenise(render(self.processor, question, len(sizes))), sizes)

    def turn(
        self, question: str, sizes: Sequence[tuple[int, int]], answer: str
    ) -> tuple[list[int], list[int]]:
        """Token ids of a question, and of its answer with the end-of-text token.

        Args:
            question, sizes: see `prompt`.
            answer: the text to learn.

        Raises:
            EvalError: as `prompt`, and if the tokenizer does not keep the prompt apart from the answer, so
                that training would show the model another prompt than generation does.
        """
        self._refuse_special(question, answer)
        text = render(self.processor, question, len(sizes))
        prompt, whole = self._tokenise(text), self._tokenise(text + reply(self.processor, text, answer))
        if whole[: len(prompt)] != prompt:
            raise EvalError(
                f"the tokenizer joins the end of the chat template with the answer '{answer}'",
                "end the chat template's generation prompt with a colon or a line break",
            )
        return self._expand(prompt, sizes), whole[len(prompt) :]

    def _refuse_special(self, question: str, answer: str = "") -> None:
        """Refuse what the tokenizer would read as a token of its own, such as the end of the text."""
        for role, text in (("question", question.replace(MARKER, " ")), ("answer", answer)):
            if special := self._special.search(text):
                raise EvalError(
                    f"the {role} '{shorten(text, 80)}' holds {special[0]}, a special token of the model",
                    "take it out of the text, or write it with spaces in it",
                )

    def _tokenise(self, text: str) -> list[int]:
        # Some chat templates write the begin-of-text token that the tokenizer puts before every text too; it
        # goes there once.
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return self.tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"]

    def _expand(self, ids: list[int], sizes: Sequence[tuple[int, int]]) -> list[int]:
        if (marked := ids.count(self.image_id)) != len(sizes):
            raise EvalError(
                f"a question has {len(sizes)} images and its chat text marks {marked} with "
                f"{self.processor.image_token}",
                "remove the mark from the text of the question, the prompt or the chat template",
            )
        counts = iter(self.image_tokens(sizes))
        return [token for i in ids for token in ([i] * next(counts) if i == self.image_id else [i])]

    def image_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """How many placeholder tokens each image takes.

        The processor's own rule, without touching a pixel.
        """
        if not sizes:
            return []
        if len(sizes) > 1 and not cuts_into_tiles(self.processor, len(sizes)):
            # One more for the line break that LLaVA-OneVision puts after each image, one less without the
            # class token.
            count = (
                self.processor.num_image_tokens
                + 1
                - (self.processor.vision_feature_select_strategy == "default")
            )
            return [count] * len(sizes)
        # Not in the processors' public documentation, but kept by transformers for serving engines; a test
        # compares it with what the processors really write.
        return list(
            self.processor._get_num_multimodal_tokens(
                image_sizes=[list(size) for size in sizes]
            ).num_image_tokens
        )


def _special_tokens(processor) -> re.Pattern[str]:
    """What the tokenizer reads as one of its special tokens wherever it stands in a text."""
    tokenizer = processor.tokenizer
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    words = {*added, *tokenizer.all_special_tokens, processor.image_token} - {""}
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))
