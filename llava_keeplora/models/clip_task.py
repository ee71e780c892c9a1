"""One classification task of a model of two encoders: its images and labels, and the model with a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llava_keeplora.models.base import Images
from llava_keeplora.models.task_model import TaskModel
from llava_keeplora_eval.encoders import CLIP, Encoders
from llava_keeplora_eval.predictors import (
    class_logits,
    image_features,
    stack_images,
    text_features,
    to_dtype,
)
from llava_keeplora_recipes import TaskData


class ClipInputs:
    """Images and labels of a split; see `Inputs`."""

    def __init__(self, data: TaskData, images: Images):
        self.data, self.images = data, images
        self.weights, self.rows = [1] * len(data), range(len(data))

    def __len__(self) -> int:
        return len(self.data)

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the image processor's outputs, each (batch, ...), and `labels` (batch,)."""
        labels = torch.tensor([self.data.labels[i] for i in indices])
        return {**stack_images(self.images.take(indices)), "labels": labels}


class ClipTask(TaskModel):
    """A model of two encoders on one classification task: cross-entropy of the logits of the class prompts.

    Class prompts go through the text encoder with gradients whenever something in it can train.

    Args:
        model: plain or with adapters.
        prompts: what the text encoder takes of one prompt per class, each (classes, tokens).
        encoders: the record of the model's type.
    """

    #: Every image counts the same, so a mean of the batches' means will do.
    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module, prompts: Mapping[str, Tensor], encoders: Encoders = CLIP):
        super().__init__(model)
        device = next(model.parameters()).device
        for key, value in prompts.items():
            self.register_buffer(key, value.to(device), persistent=False)
        self.encoders = encoders
        self._constant: Tensor | None = None
        self._once = False

    @property
    def prompts(self) -> dict[str, Tensor]:
        """What the text encoder takes of the class prompts, each (classes, tokens)."""
        return dict(self.named_buffers(recurse=False))

    def forward(self, labels: Tensor, **images: Tensor) -> dict[str, Tensor]:
        """Return loss, logits and image features of a batch.

        Mean loss over the batch, logits (batch, classes), unit-length features (batch, projection).

        Args:
            labels: (batch,), class indices.
            images: what the image encoder takes, such as `pixel_values` (batch, 3, height, width).
        """
        image = image_features(self.model, **to_dtype(images, self.model.dtype))
        logits = class_logits(self.model, image, self.text())
        return {"loss": cross_entropy(logits.float(), labels), "logits": logits, "image": image}

    def text(self) -> Tensor:
        """Unit-length text features (classes, projection), once per `constants` scope or per call."""
        if not self._once:
            return text_features(self.model, **self.prompts)
        if self._constant is None:
            self._features = text_features(self.model, **self.prompts)
            # In fp32, as its gradient then is, which is summed over the batches.
            self._constant = self._features.detach().float().requires_grad_(self._features.requires_grad)
        return self._constant.to(self._features.dtype)

    @contextmanager
    def constants(self) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """While the weights stand still, run the prompts once.

        Gives T and what the batches sent back to it, summed in fp32.

        The loss of every batch reads the same text features T, so Σ ∂loss/∂W = (∂T/∂W)ᵀ Σ ∂loss/∂T.
        """
        self._once = True
        try:
            yield self._sent_back()
        finally:
            self._once, self._constant, self._features = False, None, None

    def _sent_back(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._constant is not None and self._constant.grad is not None:
            yield self._features, self._constant.grad

    def at_every_position(self) -> "ClipTask":
        """Return the model with prompts filled up with id 0 to the text encoder's last position.

        OpenAI's `clip.tokenize` does so. Where attention is causal, the prompts' own positions stay as they
        are. Itself where prompts are at every position anyhow.
        """
        if self.encoders.padding == "max_length":
            return self
        width = self.encoders.max_tokens(self.model.config)
        own = self.attention_mask.bool()
        ids = self.input_ids.new_zeros(len(own), width)
        ids[:, : own.shape[1]] = torch.where(own, self.input_ids, 0)
        return ClipTask(self.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, self.encoders)

    def token_mask(self, part: str, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return which tokens of a part's layers carry content.

        Padding of the prompts doesn't, unless the text encoder was trained to read it; every patch does,
        unless the image processor says that it is padding.
        """
        if part != "text":
            mask = batch.get("pixel_attention_mask")
        else:
            mask = None if self.encoders.padding == "max_length" else self.prompts.get("attention_mask")
        return None if mask is None else mask.bool()

    def weight(self, batch: Mapping[str, Tensor]) -> int:
        """Return how much a batch counts in the mean loss: its number of images."""
        return len(batch["labels"])

    def first(self, batch: Mapping[str, Tensor], count: int = 1) -> dict[str, Tensor]:
        """Return a batch of its first examples alone."""
        return {key: value[:count] for key, value in batch.items()}

    def probe(self, batch: Mapping[str, Tensor]) -> None:
        """Run every layer once."""
        self(**self.first(batch))
