"""CLIP: both encoders' linear layers by part, and one classification task as a module with a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoProcessor, CLIPModel

from llava_keeplora.errors import ConfigError
from llava_keeplora.models.names import find_linear_layers
from llava_keeplora_eval.predictors import ClipPredictor, class_logits, image_features, text_features, tokenize_prompts
from llava_keeplora_recipes import Recipe


class ClipFamily:
    """A CLIP model with its processor: everything about the model, nothing about tasks or methods.

    Args:
        model: the model; its linear layers are found by part.
        processor: its processor.
    """

    kind = "classification"
    parts = {"vision": "vision_model.encoder.layers", "text": "text_model.encoder.layers"}

    def __init__(self, model: CLIPModel, processor):
        self.model = model
        self.processor = processor

    @classmethod
    def load(cls, path: str, revision: str | None, dtype: torch.dtype) -> "ClipFamily":
        """Load model and processor; `path` is a local folder or a Hub id."""
        model = CLIPModel.from_pretrained(path, revision=revision, dtype=dtype, attn_implementation="sdpa")
        return cls(model.eval().requires_grad_(False), AutoProcessor.from_pretrained(path, revision=revision))

    def linear_layers(self, part: str, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
        """Full name → linear layer for the leaf names `targets` of a part; see `find_linear_layers`."""
        return find_linear_layers(self.model, self.parts, part, targets)

    def pixels(self, images: list) -> Tensor:
        """Preprocess PIL images to (images, 3, height, width)."""
        return self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]

    def task(self, recipe: Recipe) -> "ClipTask":
        """The model on one task."""
        if recipe.kind != self.kind:
            raise ConfigError(f"task '{recipe.name}' is {recipe.kind}, and CLIP does classification only", "leave the task out of this run")
        prompts = tokenize_prompts(self.processor, recipe.prompts, self.model.config.text_config.max_position_embeddings)
        return ClipTask(self.model, prompts["input_ids"], prompts["attention_mask"])

    def predictor(self, recipe: Recipe, pixels=None) -> ClipPredictor:
        """What answers the task's examples with the present weights."""
        return ClipPredictor(self.model, self.processor, recipe, pixels=pixels)


class ClipTask(nn.Module):
    """CLIP on one classification task: cross-entropy of the scaled cosines to the class prompts.

    Class prompts go through the text encoder with gradients whenever something in it can train.

    Args:
        clip: the model, plain or with adapters.
        input_ids: (classes, tokens), one prompt per class.
        attention_mask: (classes, tokens).
    """

    def __init__(self, clip: CLIPModel, input_ids: Tensor, attention_mask: Tensor):
        super().__init__()
        self.clip = clip
        device = next(clip.parameters()).device
        self.register_buffer("input_ids", input_ids.to(device), persistent=False)
        self.register_buffer("attention_mask", attention_mask.to(device), persistent=False)
        self._constant: Tensor | None = None
        self._once = False

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean loss over the batch, and the logits (batch, classes).

        Args:
            pixel_values: (batch, 3, height, width).
            labels: (batch,), class indices.
        """
        image = image_features(self.clip, pixel_values.to(self.clip.dtype))
        logits = class_logits(self.clip, image, self.text())
        return {"loss": cross_entropy(logits.float(), labels), "logits": logits}

    def text(self) -> Tensor:
        """Unit-length text features (classes, projection), once per `constants` scope or per call."""
        if not self._once:
            return text_features(self.clip, self.input_ids, self.attention_mask)
        if self._constant is None:
            self._features = text_features(self.clip, self.input_ids, self.attention_mask)
            self._constant = self._features.detach().requires_grad_(self._features.requires_grad)
        return self._constant

    @contextmanager
    def constants(self) -> Iterator[None]:
        """While the weights stand still, run the prompts once; send their summed cotangent back at the end.

        The loss of every batch reads the same text features T, so Σ ∂loss/∂W = (∂T/∂W)ᵀ Σ ∂loss/∂T.
        """
        self._once = True
        try:
            yield
            if self._constant is not None and self._constant.grad is not None:
                self._features.backward(self._constant.grad)
        finally:
            self._once, self._constant, self._features = False, None, None

    def token_mask(self, part: str, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Which tokens of a part's layers carry content: padding of the prompts doesn't, every patch does."""
        return self.attention_mask.bool() if part == "text" else None
