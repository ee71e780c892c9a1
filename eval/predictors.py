"""What answers: the one-method interface, and zero-shot classification with any model of two encoders.

The feature and logit functions are public because training uses the very same ones, so that what is
trained and what is scored cannot drift apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from llava_keeplora_eval.class_prompts import PromptPreparation
from llava_keeplora_eval.encoders import Encoders
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_recipes import Example, Recipe

PROMPTS_PER_BATCH = 256


class Predictor(Protocol):
    """Anything that answers examples.

    One that answers each example with what was learned of one of several tasks has an attribute `routed_to`
    as well, a list of the names of these tasks for the last call, None for the untouched base; answers are
    recorded with them.
    """

    def predict(self, examples: Sequence[Example]) -> list[str]:
        """One text per example, in order; an empty text is a wrong answer."""
        ...


def image_features(model, pixel_values: Tensor, **inputs: Tensor) -> Tensor:
    """Unit-length image features, differentiable.

    Args:
        model: one of two encoders, with ``get_image_features``.
        pixel_values: (batch, 3, height, width), or as the model's image processor gives them.
        inputs: what else the image processor gives, each (batch, ...).

    Returns:
        (batch, projection).

    Source: Radford et al. 2021, figure 3.
    """
    return _unit(model.get_image_features(pixel_values=pixel_values, **inputs))


def text_features(model, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> Tensor:
    """Unit-length text features, differentiable.

    Args:
        model: one of two encoders, with ``get_text_features``.
        input_ids: (prompts, tokens).
        attention_mask: (prompts, tokens), 1 for tokens and 0 for padding; None where the text encoder attends
            to padding, as SigLIP's does.
        inputs: what else the text encoder takes, each (prompts, tokens).

    Returns:
        (prompts, projection).

    Source: Radford et al. 2021, figure 3.
    """
    return _unit(model.get_text_features(input_ids=input_ids, attention_mask=attention_mask, **inputs))


def prompt_features(model, tokens: Mapping[str, Tensor]) -> Tensor:
    """Unit-length text features of many prompts, so many at a time that memory stays small.

    Args:
        model: one of two encoders, with ``get_text_features``.
        tokens: what the text encoder takes, each (prompts, tokens), on the model's device.

    Returns:
        (prompts, projection).
    """
    pieces = zip(*(value.split(PROMPTS_PER_BATCH) for value in tokens.values()))
    return torch.cat([text_features(model, **dict(zip(tokens, piece))) for piece in pieces])


def class_logits(model, image: Tensor, text: Tensor) -> Tensor:
    """Scaled cosine similarities, the logits of the contrastive loss and of zero-shot classification.

    A model with a ``logit_bias`` (SigLIP) adds it. It is the same for every class, so that neither a softmax
    over classes nor the best class depends on it.

    Args:
        model: one of two encoders, for its ``logit_scale`` (stored as a logarithm).
        image: (batch, projection), unit length.
        text: (classes, projection), unit length.

    Returns:
        (batch, classes).

    Source: Radford et al. 2021, figure 3; Zhai et al. 2023 (arXiv 2303.15343), algorithm 1, for the bias.
    """
    logits = model.logit_scale.exp().to(image.dtype) * image @ text.T
    bias = getattr(model, "logit_bias", None)
    return logits if bias is None else logits + bias.to(image.dtype)


def to_dtype(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast what of a model's inputs is floating point, and leave masks, sizes and times as they are.

    Times are one number for each video, from which positions are computed.
    """
    return {
        key: value.to(dtype) if value.is_floating_point() and value.dim() > 1 else value
        for key, value in inputs.items()
    }


def stack_images(images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack what an image processor gives of each image, key by key, to (images, ...)."""
    return {key: torch.stack([image[key] for image in images]) for key in images[0]}


def split_images(made: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split what an image processor gives of several images into what each has; undoes `stack_images`."""
    return [dict(zip(made, values)) for values in zip(*made.values())]


class ClipPredictor:
    """Zero-shot classification with a model of two encoders: the class whose prompt is nearest to the image.

    The prompts' features are computed at the first prediction and kept; after the model's weights change,
    make a new predictor.

    Args:
        model: that of any checkpoint with two encoders.
        processor: its processor (image processor and tokenizer).
        recipe: gives ``classes`` and ``prompts``, one prompt per class.
        images: examples -> what the model takes for the image of each, instead of the processor: a cache.
        device: where to compute; the model's own device when None (the model itself is not moved).
        encoders: the record of the model's type; the one that its configuration names when None.
    """

    def __init__(
        self,
        model,
        processor,
        recipe: Recipe,
        images: Callable[[Sequence[Example]], Sequence[Mapping[str, Tensor]]] | None = None,
        device: str | torch.device | None = None,
        encoders: Encoders | None = None,
    ):
        if len(recipe.classes) != len(recipe.prompts):
            raise EvalError(
                f"recipe '{recipe.name}' has {len(recipe.classes)} classes and {len(recipe.prompts)} prompts",
                "give one prompt per class",
            )
        self.model = model
        self.processor = processor
        self.recipe = recipe
        self.images = images or self._processed
        parameter = next(model.parameters())
        self.device = torch.device(device) if device is not None else parameter.device
        self.dtype = parameter.dtype
        self.preparation = PromptPreparation.of(processor, model.config, encoders)
        self._prompts = [recipe.prompts]
        self._text: Tensor | None = None
        self._head: Callable[[Tensor], Tensor] | None = None

    @property
    def settings(self) -> dict[str, str]:
        """Settings on which answers depend in addition to the weights, as JSON data."""
        return {"dtype": str(self.dtype).removeprefix("torch.")}

    def with_head(self, head: Callable[[Tensor], Tensor]) -> ClipPredictor:
        """Return the predictor with other logits added to those of the prompts.

        Args:
            head: unit-length image features (examples, projection) -> logits (examples, classes).
        """
        other = copy.copy(self)
        other._head = head
        return other

    def with_test_prompts(self) -> ClipPredictor:
        """Return the predictor with the averaged features of the recipe's test prompts."""
        other = copy.copy(self)
        other._prompts, other._text = (
            [self.recipe.class_prompts(template) for template in self.recipe.test_prompts] or self._prompts,
            None,
        )
        return other

    @torch.no_grad()
    def logits(self, examples: Sequence[Example]) -> Tensor:
        """Class logits, (examples, classes), on the predictor's device.

        The model is in eval mode meanwhile.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            if self._text is None:
                self._text = self.prompt_features()
            image = image_features(self.model, **self.inputs(examples))
            logits = class_logits(self.model, image, self._text)
            return logits if self._head is None else logits + self._head(image)
        finally:
            self.model.train(was_training)

    def predict(self, examples: Sequence[Example]) -> list[str]:
        """Return the nearest class of each example, spelled as in ``recipe.classes``.

        Raises:
            EvalError: logits are NaN or infinite.
        """
        if not examples:
            return []
        logits = self.logits(examples)
        if bad := [
            example.id for example, row in zip(examples, logits.isfinite().all(dim=1).tolist()) if not row
        ]:
            raise no_numbers(bad[0], self.dtype)
        return [self.recipe.classes[index] for index in logits.argmax(dim=1).tolist()]

    def inputs(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return the image encoder's inputs (examples, ...), on the predictor's device and in its dtype."""
        stacked = stack_images(self.images(examples))
        return to_dtype({key: value.to(self.device) for key, value in stacked.items()}, self.dtype)

    @torch.no_grad()
    def features(self, examples: Sequence[Example]) -> Tensor:
        """Return unit-length features of the examples' images (examples, projection), in fp32."""
        return image_features(self.model, **self.inputs(examples)).float()

    @torch.no_grad()
    def class_features(self) -> Tensor:
        """Return unit-length features of the class prompts (classes, projection), in fp32."""
        return self.prompt_features().float()

    def _processed(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        images = [example.image for example in examples]
        image_processor = getattr(self.processor, "image_processor", self.processor)
        return split_images(image_processor(images=images, return_tensors="pt"))

    def prompt_features(self) -> Tensor:
        """Unit-length features of the class prompts (classes, projection), by the model as it is now.

        Of several prompts of a class, each one's feature is made unit-length, then their mean.

        Source: the tests of CLIP (Radford et al., 2021, section 3.1.4) and of ZSCL (Zheng et al., 2023).
        """
        each = [self._features(prompts) for prompts in self._prompts]
        if len(each) == 1:
            return each[0]
        mean = torch.stack(each).mean(dim=0)
        return mean / mean.norm(dim=-1, keepdim=True)

    def _features(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.preparation.tokens(prompts)
        return prompt_features(self.model, {key: value.to(self.device) for key, value in tokens.items()})


def no_numbers(example: str, dtype: torch.dtype) -> EvalError:
    """Return the error for a model whose outputs are NaN or infinite.

    Without it, the answer would be the first class or token.

    Args:
        example: the id of the first such example.
        dtype: the model's.
    """
    name = str(dtype).removeprefix("torch.")
    return EvalError(
        f"the model's outputs for example '{example}' are NaN or infinite in {name}",
        "use a dtype of more range (bfloat16, float32), or check the checkpoint's weights",
    )


def default_device() -> str:
    """``cuda`` where a GPU is usable, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _unit(output) -> Tensor:
    # transformers 5 returns an output object whose pooler_output is projected; older ones the tensor itself.
    features = output if isinstance(output, Tensor) else output.pooler_output
    return features / features.norm(dim=-1, keepdim=True)
