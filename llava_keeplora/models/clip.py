"""Models of two encoders (CLIP, SigLIP, ...): both encoders' linear layers by part, and their processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Self

import torch
import transformers  # its models, which take seconds to import, are looked up where they are used
from PIL import Image
from torch import Tensor, nn

from llava_keeplora.config import ALL_LINEAR, EvaluationConfig, ModelConfig
from llava_keeplora.deepspeed_zero import loaded_whole
from llava_keeplora.errors import ConfigError
from llava_keeplora.models.base import Images
from llava_keeplora.models.clip_task import ClipInputs, ClipTask
from llava_keeplora.models.crops import RandomCrops
from llava_keeplora.models.given import GivenModel
from llava_keeplora.models.linear_layers import find_linear_layers
from llava_keeplora.models.meta_model import build_meta_model
from llava_keeplora.models.quantization import keep_form, leave_checkpoint, quantization_kwargs
from llava_keeplora.models.usage import Usage, classification_usage
from llava_keeplora.models.workload import ANSWER, Work, on_meta, repeated
from llava_keeplora_eval.checkpoints import load_checked
from llava_keeplora_eval.class_prompts import PromptPreparation
from llava_keeplora_eval.encoders import Encoders, find_encoders
from llava_keeplora_eval.models import load_clip_processor
from llava_keeplora_eval.predictors import (
    ClipPredictor,
    class_logits,
    image_features,
    prompt_features,
    split_images,
    to_dtype,
)
from llava_keeplora_eval.preparation import check_questions
from llava_keeplora_recipes import Example, Recipe, TaskData

#: Tokens of a class prompt, where there is no tokenizer to ask.
PROMPT = 16


class ClipFamily:
    """A model of two encoders with its processor; see `models/base.py`.

    What its type is like is a record of `llava_keeplora_eval.encoders`.

    Args:
        path: a local folder or a Hub id.
        revision: the Hub revision.
        quantization: see `ModelConfig`.
        attn_implementation: see `ModelConfig`.
        parts: part → dotted prefix of its layers, for a type of model without a record; all linear layers of
            a part are adapted unless a configuration names targets.
        given: a model in memory, in the place of the checkpoint.
    """

    name = "clip"
    kinds = ("classification",)
    auto_class = "AutoModel"
    eval_cost = 1.0

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        quantization: str | None = None,
        attn_implementation: str = "sdpa",
        parts: Mapping[str, str] | None = None,
        given: GivenModel | None = None,
    ):
        self.path, self.revision, self.quantization = path, revision, quantization
        self.attn_implementation = attn_implementation
        self._own_parts, self._given = parts, given
        if given is not None:
            self.config, self.processor = given.model.config, given.clip_processor()

    @classmethod
    def from_config(
        cls, path: str, model: ModelConfig, evaluation: EvaluationConfig, given: GivenModel | None = None
    ) -> Self:
        """Open the model that a configuration names; see `llava_keeplora.models.Family`.

        Raises:
            ConfigError: for a setting of models that write answers, or a type of model that is not known.
        """
        unread = {"model.max_length": model.max_length, "evaluation.generation": evaluation.generation}
        for key in (key for key, value in unread.items() if value):
            raise ConfigError(
                f"{key} is {unread[key]}, which is of models that write answers, and "
                f"{path} is a model of two encoders",
                f"remove {key}",
            )
        if model.parts and model.quantization:
            raise ConfigError(
                f"model.parts is set and model.quantization is {model.quantization}, and which layers of "
                "such a model can be quantised is not known",
                "remove model.quantization, or give a family of your own (docs/extending.md)",
            )
        family = cls(path, model.revision, model.quantization, model.attn_implementation, model.parts, given)
        _ = family.encoders  # Refuses a type without a record before any data are read.
        return family

    # Read when first asked for: a plan can do with the configuration alone.
    @cached_property
    def processor(self):
        """The model's processor."""
        return load_clip_processor(self.path, self.revision)

    @cached_property
    def preparation(self) -> PromptPreparation:
        """Makes token ids."""
        return PromptPreparation.of(self.processor, self.config, self.encoders)

    @cached_property
    def config(self) -> transformers.PretrainedConfig:
        """The model's configuration."""
        return transformers.AutoConfig.from_pretrained(
            self.path, revision=self.revision, trust_remote_code=False
        )

    @cached_property
    def encoders(self) -> Encoders:
        """What the model's type is like.

        Raises:
            ConfigError: for a type without a record, where no parts are given.
        """
        known = find_encoders(self.config)
        if self._own_parts:
            targets = dict.fromkeys(self._own_parts, (ALL_LINEAR,))
            return replace(known, parts=dict(self._own_parts), targets=targets)
        if not known.parts:
            raise ConfigError(
                f"where the layers of {self.path}, a {self.config.model_type}, lie is not known",
                "name them under model.parts, such as `{vision: vision_model.encoder.layers, text: "
                "text_model.encoder.layers}`",
            )
        return known

    @property
    def parts(self) -> Mapping[str, str]:
        """Part → dotted prefix of its layers."""
        return self.encoders.parts

    @property
    def targets(self) -> Mapping[str, tuple[str, ...]]:
        """Part → leaf names of the layers that are adapted unless a configuration says otherwise."""
        return self.encoders.targets

    @property
    def skip_quantization(self) -> tuple[str, ...]:
        """Dotted prefixes of what stays unquantised."""
        return self.encoders.skip_quantization

    @property
    def unsupported(self) -> Mapping[str, str]:
        """Settings that the model can't follow; see `Family`."""
        found = {}
        if self.encoders.keeps_shape:
            found["random_resized_crop"] = "crops images to squares"
        if not self.encoders.causal and self.encoders.padding != "max_length":
            found["every_position"] = "reads prompts with padding that nothing masks"
        return found

    def _accepted(self, model: nn.Module) -> nn.Module:
        """Return a model if it has two encoders.

        Raises:
            ConfigError: for one that lacks what a model of two encoders is asked for.
        """
        asked = ("get_image_features", "get_text_features", "logit_scale")
        if missing := [name for name in asked if not hasattr(model, name)]:
            raise ConfigError(
                f"{self.path} is a {self.config.model_type}, which has no {', '.join(missing)} as models of "
                "two encoders have",
                "leave model.family out, or give a family of your own (docs/extending.md)",
            )
        return model

    def skeleton(self, dtype: torch.dtype) -> None:
        """Set `model` to one without weights, on the meta device; see `build_meta_model`."""
        self.model = build_meta_model(
            lambda: self._accepted(
                transformers.AutoModel.from_config(
                    self.config, dtype=dtype, attn_implementation=self.attn_implementation
                )
            ),
            self.quantization,
            self.skip_quantization,
        )

    def load(self, dtype: torch.dtype) -> None:
        """Load the weights; see `load_checked`."""
        if self._given is not None:
            return self._given.load_into(self, dtype)
        # DeepSpeed can't load CLIP's temperature, a scalar, in shards; the whole of a CLIP fits into any
        # process.
        with loaded_whole():
            form = quantization_kwargs(self.quantization, dtype, self.skip_quantization)
            model = load_checked(
                transformers.AutoModel,
                self.path,
                revision=self.revision,
                dtype=dtype,
                attn_implementation=self.attn_implementation,
                **form,
            )
        if self.quantization:
            keep_form(model)
            leave_checkpoint(model)
        self.model = self._accepted(model).eval().requires_grad_(False)

    def linear_layers(self, part: str, targets: Sequence[str]) -> dict[str, nn.Linear]:
        """Full name → linear layer for the leaf names `targets` of a part; see `find_linear_layers`."""
        return find_linear_layers(self.model, self.parts, part, targets)

    def layers_without_gradient(self, part: str, targets: Sequence[str]) -> list[str]:
        """Layers that the loss cannot reach: none."""
        return []

    def prepare(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Return the image processor's outputs for each image: `pixel_values`, (3, height, width), ..."""
        images = [example.image for example in examples]
        return split_images(self.processor.image_processor(images=images, return_tensors="pt"))

    def inputs(self, data: TaskData, images: Images) -> "ClipInputs":
        """Return a split as CLIP trains on it.

        Raises:
            EvalError: see `check`.
        """
        self.check(data)
        return ClipInputs(data, images)

    def crops(self, data: TaskData, scale: tuple[float, float], seed: int) -> RandomCrops:
        """Return a split's images as random crops; see `RandomCrops`."""
        return RandomCrops(
            self.processor.image_processor, self.config.vision_config.image_size, data, scale, seed
        )

    def check(self, data: TaskData) -> None:
        """Check that every example can be answered.

        Raises:
            EvalError: for a task that is no classification, or a class prompt that the model would see cut
                short.
        """
        check_questions(self.preparation, data)

    def task(self, recipe: Recipe) -> "ClipTask":
        """Return the model on one task."""
        return ClipTask(self.model, self.tokens(recipe.prompts), self.encoders)

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the text encoder's inputs for texts, each (texts, tokens); see `tokenize_prompts`."""
        return self.preparation.tokens(texts)

    def predictor(self, recipe: Recipe, images: Images, tokens: int | None = None) -> ClipPredictor:
        """Return the predictor of a task with the present weights; it writes no `tokens`."""
        return ClipPredictor(self.model, self.processor, recipe, images=images.of, encoders=self.encoders)

    def workload(self, recipe: Recipe, train: TaskData | None, test: TaskData | None) -> Work:
        """Return what a task asks of the machine: every image is alike, so the class prompts decide.

        Raises:
            ConfigError: for classes that are read from data which are not there.
        """
        if train is not None and test is not None:
            self.check(test)
        if train is None and not recipe.classes:
            prompts = self._assumed_prompts(recipe)
        else:
            prompts = self.tokens(recipe.prompts)
        images, classes = self._blank_image(), recipe.classes or [" " * ANSWER]
        learned, asked = (len(data or ()) for data in (train, test))
        return Work(
            recipe.name,
            learned,
            asked,
            learned + asked,
            {**images, "labels": torch.zeros(1, dtype=torch.long)},
            images,
            prompts,
            sum(map(len, classes)) / len(classes),
        )

    def _assumed_prompts(self, recipe: Recipe) -> dict[str, Tensor]:
        if not recipe.num_classes:
            raise ConfigError(
                f"the classes of '{recipe.name}' are read from its data, which are not there",
                "give the folder that holds them with --data-root",
            )
        limit = self.encoders.max_tokens(self.config)
        full = self.encoders.padding == "max_length"
        ids = torch.zeros(recipe.num_classes, limit if full else min(PROMPT, limit), dtype=torch.long)
        return {"input_ids": ids} | ({} if full else {"attention_mask": torch.ones_like(ids)})

    def _blank_image(self) -> dict[str, Tensor]:
        """Return the inputs for an image without content, as a batch of one on the meta device."""
        side = getattr(self.config.vision_config, "image_size", None)
        if isinstance(side, int):
            return {"pixel_values": torch.empty(1, 3, side, side, device="meta")}
        blank = Image.new("RGB", (256, 256))
        return on_meta(self.processor.image_processor(images=[blank], return_tensors="pt"))

    def workload_task(self, work: Work) -> "ClipTask":
        """Return the model on a task by its class prompts."""
        return ClipTask(self.model, work.prompts, self.encoders)

    def answer(self, work: Work, size: int) -> None:
        """Run the steps of `ClipPredictor` on one batch: the prompts' features, then the images'."""
        text = prompt_features(self.model, work.prompts)
        images = to_dtype(repeated(work.question, size), self.model.dtype)
        class_logits(self.model, image_features(self.model, **images), text)

    def usage(self, data: TaskData) -> Usage:
        """Return how plain transformers load and ask the model, with a few of a task's captions."""
        return classification_usage(
            self.config.model_type, self.auto_class, data.recipe.prompts[:4], self.preparation.padding
        )
