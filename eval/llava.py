"""Generation: answers to questions about images from any model of the LLaVA family."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers  # its models, which take seconds to import, are looked up where they are used
from torch import Tensor
from torch.nn.functional import normalize

from llava_keeplora_eval.chat import Encoding, image_inputs, question_text
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.generation import check_generation
from llava_keeplora_eval.image_inputs import joined
from llava_keeplora_eval.predictors import no_numbers, to_dtype
from llava_keeplora_eval.preparation import ChatPreparation
from llava_keeplora_recipes import Example, Recipe
from llava_keeplora_recipes.videos import frame_time


def question_features(model, inputs: Mapping[str, Tensor], image_ids: Collection[int]) -> Tensor:
    """Return `LlavaPredictor.features` of questions as the model takes them.

    Args:
        model: a LLaVA-family model.
        inputs: a batch of questions, padded on the right.
        image_ids: the tokens that stand for images.
    """
    hidden = model.model(**inputs, use_cache=False).last_hidden_state.float()
    asked = inputs["attention_mask"].bool()
    image = asked & torch.isin(inputs["input_ids"], torch.tensor([*image_ids]).to(hidden.device))
    means = [
        (hidden * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True).clamp(min=1)
        for kept in (image, asked & ~image)
    ]
    return normalize(torch.cat([normalize(mean, dim=1) for mean in means], dim=1), dim=1)


class LlavaPredictor:
    """Answers in batches padded on the left, greedy unless settings say otherwise.

    What a checkpoint's `generation_config.json` sets has no effect but for its end tokens: a score is the
    harness's, not the file's.

    Args:
        model: a LLaVA-family model with `generate`.
        processor: its processor.
        recipe: what a classification task asks.
        max_new_tokens: where an answer is cut off at the latest.
        images: examples → one `image_inputs` each, instead of the processor: a cache.
        device: where to compute; the model's own device when None.
        min_new_tokens: how far an answer goes on at the least.
        limit: the most tokens of a question and its answer, image tokens included; the language model's own
            when None.
        generation: settings other than greedy ones; see `llava_keeplora_eval.generation.SETTINGS`.
    """

    def __init__(
        self,
        model,
        processor,
        recipe: Recipe,
        max_new_tokens: int = 128,
        images: Callable[[Sequence[Example]], list[dict[str, Tensor]]] | None = None,
        device: str | torch.device | None = None,
        min_new_tokens: int | None = None,
        limit: int | None = None,
        generation: Mapping[str, Any] | None = None,
    ):
        self.model, self.recipe = model, recipe
        # `data check`, plan, train and predict take ids and lengths from one place.
        self.preparation = ChatPreparation(
            processor, limit or model.config.get_text_config().max_position_embeddings, max_new_tokens
        )
        self.chat = self.preparation.chat
        self.images = images or (
            lambda examples: [image_inputs(processor, e.images, e.videos) for e in examples]
        )
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        chosen = {"do_sample": False, "max_new_tokens": max_new_tokens, **check_generation(generation or {})}
        if min_new_tokens is not None:
            chosen["min_new_tokens"] = min_new_tokens
        self.generation = transformers.GenerationConfig(
            **chosen,
            eos_token_id=self._stops(),
            bos_token_id=self.chat.tokenizer.bos_token_id,
            pad_token_id=self.chat.pad_id,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Settings on which answers depend in addition to the weights, as JSON data."""
        chosen = {
            key: value
            for key, value in self.generation.to_diff_dict().items()
            if key != "transformers_version"
        }
        return {"generation": chosen, "dtype": str(self.model.dtype).removeprefix("torch.")}

    def _stops(self) -> list[int]:
        """Return the model's own end tokens, and those with which training ends an answer."""
        stops = getattr(self.model.generation_config, "eos_token_id", None)
        tokens = {
            token
            for token in [*(stops if isinstance(stops, list) else [stops]), *self.chat.end_ids]
            if token is not None
        }
        if not all(type(token) is int for token in tokens):
            raise EvalError(
                f"the checkpoint's generation_config.json has the eos_token_id {stops!r}",
                "write a token's id, or a list of them",
            )
        return sorted(tokens)

    @torch.no_grad()
    def predict(self, examples: Sequence[Example]) -> list[str]:
        """One text per example, without white space around it; it ends where the model's tokens do.

        Raises:
            EvalError: a question leaves no room for an answer.
        """
        if not examples:
            return []
        prompts = self._prompts(examples)
        rooms = [self._room(example, len(prompt)) for example, prompt in zip(examples, prompts)]
        inputs = self._inputs(prompts, examples, left=True)
        width = inputs["input_ids"].shape[1]
        was_training = self.model.training
        self.model.eval()
        try:
            with without_defaults(self.model):
                out = self.model.generate(
                    **inputs,
                    generation_config=self.generation,
                    logits_processor=[_refuse_nan(examples, self.model.dtype)],
                )
        except (ValueError, IndexError) as error:
            raise EvalError(
                f"the model cannot take what its processor makes of example '{examples[0].id}' "
                f"({str(error).splitlines()[0][:200]})",
                "check that config.json and the processor's files are of one checkpoint",
            ) from error
        finally:
            self.model.train(was_training)
        answers = [ids[:room] for ids, room in zip(out[:, width:].tolist(), rooms)]
        return [text.strip() for text in self.chat.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    @torch.no_grad()
    def features(self, examples: Sequence[Example]) -> Tensor:
        """Return unit-length features of the examples' questions (examples, 2 hidden), in fp32.

        They are the mean last hidden state over a question's image tokens and that over its other tokens,
        each of unit length; zeros for images where it has none.
        """
        inputs = self._inputs(self._prompts(examples), examples)
        return question_features(self.model, inputs, self.chat.image_ids)

    def class_features(self) -> None:
        """Return None: classes are answers in words, and none is a question."""

    def _prompts(self, examples: Sequence[Example]) -> list[Encoding]:
        return [
            self.chat.prompt(
                question_text(self.recipe, example.question),
                [(image.height, image.width) for image in example.images],
                example.history,
                example.videos,
                [frame_time(image) for image in example.images],
            )
            for example in examples
        ]

    def _inputs(
        self, prompts: Sequence[Encoding], examples: Sequence[Example], left: bool = False
    ) -> dict[str, Tensor]:
        """Return questions as a batch on the predictor's device and in the model's dtype."""
        inputs = batched_tokens(prompts, self.chat.pad_id, left) | joined(self.images(examples))
        return to_dtype({key: value.to(self.device) for key, value in inputs.items()}, self.model.dtype)

    def _room(self, example: Example, tokens: int) -> int:
        """How many tokens the model takes after those of a question."""
        if tokens >= (limit := self.preparation.limit):
            raise EvalError(
                f"the question of '{example.id}' has {tokens} tokens, image tokens included, and the model "
                f"takes {limit}, its answer among them",
                "shorten or remove it",
            )
        return limit - tokens


def _refuse_nan(examples: Sequence[Example], dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a logits processor that raises if scores (examples × beams, vocabulary) are NaN or +inf."""

    def check(ids: Tensor, scores: Tensor) -> Tensor:
        bad = (scores.isnan() | scores.isposinf()).any(dim=1)
        if bad.any():
            raise no_numbers(examples[int(bad.nonzero()[0]) * len(examples) // len(scores)].id, dtype)
        return scores

    return check


@contextmanager
def without_defaults(model) -> Iterator[None]:
    """Hide the checkpoint's own generation settings from `generate`.

    It takes from them whatever its caller leaves unset.
    """
    kept, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def batched_tokens(encodings: Sequence[Encoding], pad_id: int, left: bool = False) -> dict[str, Tensor]:
    """Return conversations as one batch: `input_ids`, `attention_mask` and the inputs of tokens by key.

    Args:
        encodings: the conversations.
        pad_id: the id that fills `input_ids` up; the other inputs are filled up with zeros.
        left: whether to fill up on the left, as generation needs it.

    Returns:
        (conversations, tokens) each.
    """
    width = max(map(len, encodings))

    def padded(rows: list[list[int]], value: int) -> Tensor:
        filled = [[value] * (width - len(row)) for row in rows]
        return torch.tensor([fill + row if left else row + fill for fill, row in zip(filled, rows)])

    ids = [encoding.prompt + encoding.reply for encoding in encodings]
    return {
        "input_ids": padded(ids, pad_id),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        **{key: padded([e.extra[key] for e in encodings], 0) for key in encodings[0].extra},
    }
