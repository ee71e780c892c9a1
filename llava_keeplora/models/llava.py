"""Models that write text, as a family.

Types and their parts are in `layouts.py`; tasks are questions, captions and classes as answers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Self

import torch
import transformers  # its models, which take seconds to import, are looked up where they are used
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llava_keeplora.config import EvaluationConfig, ModelConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.models.base import Images
from llava_keeplora.models.chat_batch import IGNORE, collate_turns
from llava_keeplora.models.given import GivenModel
from llava_keeplora.models.layouts import LAYOUTS, find_parts
from llava_keeplora.models.linear_layers import find_linear_layers
from llava_keeplora.models.llava_workload import LlavaWorkload
from llava_keeplora.models.meta_model import build_meta_model
from llava_keeplora.models.quantization import keep_form, leave_checkpoint, quantization_kwargs
from llava_keeplora.models.task_model import TaskModel
from llava_keeplora.models.usage import Usage, generation_usage
from llava_keeplora.models.workload import Work
from llava_keeplora_eval.chat import image_inputs, question_text
from llava_keeplora_eval.chat_text import given_videos, render
from llava_keeplora_eval.checkpoints import load_checked
from llava_keeplora_eval.image_inputs import TOKEN_KEYS
from llava_keeplora_eval.llava import LlavaPredictor
from llava_keeplora_eval.predictors import to_dtype
from llava_keeplora_eval.preparation import ChatPreparation, check_questions
from llava_keeplora_eval.processors import feature_layers, load_chat_processor
from llava_keeplora_recipes import Example, Recipe, TaskData

LAYER_NUMBER = re.compile(r"\.(?:layers?|blocks)\.(\d+)\.")


class LlavaFamily(LlavaWorkload):
    """A LLaVA model with its processor; see `models/base.py`.

    Args:
        path: a local folder or a Hub id.
        revision: the Hub revision.
        max_length: the most tokens of an example, image tokens included; the language model's own limit when
            None.
        max_new_tokens: of an answer.
        quantization: see `ModelConfig`.
        attn_implementation: see `ModelConfig`.
        generation: of an answer; see `EvaluationConfig`.
        parts: part → dotted prefix, for a type of model that is not known; see `find_parts`.
        given: a model in memory, in the place of the checkpoint.
    """

    name = "llava"
    unsupported = {
        "random_resized_crop": "crops what CLIP trains on",
        "test_prompts": "averages the text features of CLIP",
        "keeps_features": "writes answers instead of comparing image features with prompts",
    }
    kinds = ("classification", "vqa", "captioning")
    auto_class = "AutoModelForImageTextToText"
    eval_cost = 3.0

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        max_length: int | None = None,
        max_new_tokens: int = 128,
        quantization: str | None = None,
        attn_implementation: str = "sdpa",
        generation: Mapping[str, Any] | None = None,
        parts: Mapping[str, str] | None = None,
        given: GivenModel | None = None,
    ):
        self.path, self.revision, self.max_new_tokens, self.quantization = (
            path,
            revision,
            max_new_tokens,
            quantization,
        )
        self.attn_implementation, self.generation, self._given = attn_implementation, generation, given
        if given is not None:
            self.config, self.processor = given.model.config, given.chat_processor()
        else:
            self.config = transformers.AutoConfig.from_pretrained(
                path, revision=revision, trust_remote_code=False
            )
        layout = find_parts(self.config, path, parts)
        self.parts, self.targets = layout.prefixes, layout.targets
        self.skip_quantization = ("lm_head", *layout.unquantized)
        positions = self.config.get_text_config().max_position_embeddings
        if max_length is not None and max_length > positions:
            raise ConfigError(
                f"model.max_length is {max_length}, and '{path}' has positions for {positions} tokens",
                f"set it to {positions} or less",
            )
        self.max_length = max_length or positions

    @classmethod
    def from_config(
        cls, path: str, model: ModelConfig, evaluation: EvaluationConfig, given: GivenModel | None = None
    ) -> Self:
        """Open the model that a configuration names; see `llava_keeplora.models.Family`."""
        return cls(
            path,
            model.revision,
            model.max_length,
            evaluation.max_new_tokens,
            model.quantization,
            model.attn_implementation,
            evaluation.generation,
            model.parts,
            given,
        )

    # Read when first asked for: a plan can do with the configuration alone.
    @cached_property
    def processor(self):
        """The model's processor."""
        return load_chat_processor(self.path, self.revision)

    @cached_property
    def preparation(self) -> ChatPreparation:
        """Makes token ids."""
        return ChatPreparation(self.processor, self.max_length, self.max_new_tokens)

    def skeleton(self, dtype: torch.dtype) -> None:
        """Set `model` to one without weights, on the meta device; see `build_meta_model`."""
        self.model = build_meta_model(
            lambda: transformers.AutoModelForImageTextToText.from_config(
                self.config, dtype=dtype, attn_implementation=self.attn_implementation
            ),
            self.quantization,
            self.skip_quantization,
        )

    def load(self, dtype: torch.dtype) -> None:
        """Load the weights; see `load_checked`."""
        if self._given is not None:
            return self._given.load_into(self, dtype)
        form = quantization_kwargs(self.quantization, dtype, self.skip_quantization)
        model = load_checked(
            transformers.AutoModelForImageTextToText,
            self.path,
            revision=self.revision,
            dtype=dtype,
            attn_implementation=self.attn_implementation,
            **form,
        )
        if self.quantization:
            keep_form(model)
            leave_checkpoint(model)
        self.model = model.eval().requires_grad_(False)

    def linear_layers(self, part: str, targets: Sequence[str]) -> dict[str, nn.Linear]:
        """Return full name → linear layer for the leaf names `targets` of a part that the loss reaches."""
        layers = find_linear_layers(self.model, self.parts, part, targets)
        return {name: layer for name, layer in layers.items() if self._reached(part, name)}

    def layers_without_gradient(self, part: str, targets: Sequence[str]) -> list[str]:
        """Layers of the vision encoder past the last one whose output is used; the loss cannot reach them."""
        return [
            name
            for name in find_linear_layers(self.model, self.parts, part, targets)
            if not self._reached(part, name)
        ]

    def _reached(self, part: str, name: str) -> bool:
        """Return whether a layer feeds the features.

        `vision_feature_layer` indexes hidden states, of which the embedding's is 0; without it, all are used.
        """
        used = feature_layers(self.config) if part == "vision" else []
        if not used:
            return True
        depth = self.config.vision_config.num_hidden_layers
        return int(LAYER_NUMBER.search(name).group(1)) < max(i if i >= 0 else depth + 1 + i for i in used)

    def prepare(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Return what the model takes for each example's images; see `image_inputs`."""
        return [image_inputs(self.processor, example.images, example.videos) for example in examples]

    def inputs(self, data: TaskData, images: Images) -> "LlavaInputs":
        """Return a split as the model trains on it.

        Raises:
            EvalError: if an example has no answer to learn, or more tokens than the model takes.
        """
        return LlavaInputs(data, images, self.preparation)

    def check(self, data: TaskData) -> None:
        """Check that every example can be answered.

        Raises:
            EvalError: if a question leaves no room for an answer.
        """
        check_questions(self.preparation, data)

    def task(self, recipe: Recipe) -> "LlavaTask":
        """Return the model on one task."""
        return LlavaTask(self.model, blank=self.blank)

    def workload_task(self, work: Work) -> "LlavaTask":
        """Return the model on any task."""
        return LlavaTask(self.model)

    @cached_property
    def blank(self) -> dict[str, Tensor]:
        """What the model takes for an image without content."""
        return image_inputs(self.processor, [Image.new("RGB", (64, 64))])

    def predictor(self, recipe: Recipe, images: Images, tokens: int | None = None) -> LlavaPredictor:
        """Return the predictor of a task with the present weights.

        With exactly so many `tokens` each, where they are given.
        """
        return LlavaPredictor(
            self.model,
            self.processor,
            recipe,
            tokens or self.max_new_tokens,
            images=images.of,
            min_new_tokens=tokens,
            limit=self.max_length,
            generation=self.generation,
        )

    def usage(self, data: TaskData) -> Usage:
        """Return how plain transformers load and ask the model, with a task's first question."""
        question = question_text(data.recipe, data.questions[0])
        images = max(1, data.image_counts[0])
        videos = given_videos(self.processor, images, data.videos[0])
        prompt = render(self.processor, question, images, data.histories[0], videos=videos)
        begin = self.processor.tokenizer.bos_token
        begun = bool(begin) and prompt.startswith(begin)
        frames = [end - start for start, end in videos]
        images -= sum(frames)
        kind = self.config.model_type
        served = kind in LAYOUTS and LAYOUTS[kind].served
        return generation_usage(kind, self.auto_class, prompt, images, begun, served, frames)


class LlavaInputs:
    """Token ids and images of a split, one entry per answer to learn; see `Inputs`.

    A question with several answers is trained on the one most often given, an image with several captions on
    each.

    Args:
        data: the split.
        images: its images.
        preparation: makes the token ids.

    Raises:
        EvalError: see `LlavaFamily.inputs`.
    """

    def __init__(self, data: TaskData, images: Images, preparation: ChatPreparation):
        self.images, self.pad_id = images, preparation.chat.pad_id
        self.turns = preparation.learn(data)
        # The first token is never predicted, and it never belongs to an answer.
        self.weights = [turn.learned for turn in self.turns]
        self.rows = [turn.row for turn in self.turns]

    def __len__(self) -> int:
        return len(self.turns)

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch, padded on the right; see `collate_turns`."""
        turns = [self.turns[i] for i in indices]
        return collate_turns(turns, self.images.take([self.rows[i] for i in indices]), self.pad_id)


class LlavaTask(TaskModel):
    """LLaVA on one task: cross-entropy of the answers' tokens, the mean over all of a batch's answer tokens.

    Args:
        model: plain or with adapters.
        counts_examples: whether the loss is the mean of the examples' own means instead.
        blank: what the model takes for an image without content, for batches without images; an image of
            zeros of the vision encoder's size when None.
    """

    #: `transformers.Trainer` counts the answer tokens of every optimiser step, because batches hold different
    #: numbers of them.
    accepts_loss_kwargs = True

    def __init__(
        self, model: nn.Module, counts_examples: bool = False, blank: Mapping[str, Tensor] | None = None
    ):
        super().__init__(model)
        self.counts_examples, self.blank = counts_examples, blank

    def counting_examples(self) -> "LlavaTask":
        """Return the model with the mean of the examples' mean losses, whatever their answers' lengths."""
        return LlavaTask(self.model, counts_examples=True, blank=self.blank)

    def forward(self, labels: Tensor, image_rows: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Return the mean loss, and the logits of the answers' tokens (answer tokens, vocabulary).

        Args:
            labels: (batch, tokens), `IGNORE` wherever nothing is learned.
            image_rows: (batch, keys); see `collate_turns`.
            inputs: `input_ids`, `attention_mask`, and what else the model takes for tokens and images.
        """
        inputs = to_dtype(inputs, self.model.dtype)
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        target = labels[:, 1:]
        answered = target != IGNORE
        # The vocabulary is wide and answers are short: logits where something is learned, and nowhere else.
        logits = self.model.lm_head(hidden[:, :-1][answered]).float()
        if (cap := getattr(self.config.get_text_config(), "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap  # Gemma 2's language model, in PaliGemma 2
        if self.counts_examples:
            shares = answered / (len(answered) * answered.sum(1, keepdim=True))
            loss = (cross_entropy(logits, target[answered], reduction="none") * shares[answered]).sum()
        else:
            loss = cross_entropy(logits, target[answered])
        return {"loss": loss if image_rows.any() else loss + self._without_images(), "logits": logits}

    def _without_images(self) -> Tensor:
        """Return zero, as a function of the vision encoder and the connector.

        Processes that share gradients wait for every trainable tensor's, and a batch of text alone would give
        none.
        """
        language = {id(p) for p in self.model.model.get_decoder().parameters()}
        trained = any(p.requires_grad and id(p) not in language for p in self.model.model.parameters())
        if not trained or not torch.is_grad_enabled():
            return torch.zeros((), device=self.model.device)
        return 0.0 * self._blank_features()

    def _blank_features(self) -> Tensor:
        """Return the sum of what the connector makes of an image without content."""
        side = getattr(self.config.vision_config, "image_size", None)
        blank = self.blank or {"pixel_values": torch.zeros(1, 3, side, side)}
        model = self.model.model
        taken = inspect.signature(model.get_image_features).parameters
        inputs = {key: value.to(model.device) for key, value in blank.items() if key in taken}
        return _summed(model.get_image_features(**to_dtype(inputs, model.dtype)))

    def probe(self, batch: Mapping[str, Tensor]) -> None:
        """Run every layer once.

        On the batch's first example, and without its images, where it has none, on one without content.
        """
        first = self.first(batch)
        self(**first)
        if not first["image_rows"].any():
            self._blank_features()

    @contextmanager
    def constants(self) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Yield nothing: nothing is the same for every batch."""
        yield iter(())

    def weight(self, batch: Mapping[str, Tensor]) -> int:
        """Return how much a batch counts in the mean loss: its answer tokens, or its examples."""
        return len(batch["labels"]) if self.counts_examples else int((batch["labels"][:, 1:] != IGNORE).sum())

    def first(self, batch: Mapping[str, Tensor], count: int = 1) -> dict[str, Tensor]:
        """Return a batch of its first examples alone."""
        rows = batch["image_rows"][:count].sum(dim=0).tolist()
        images = [key for key in sorted(batch) if key not in (*TOKEN_KEYS, "labels", "image_rows")]
        kept = {key: batch[key][:number] for key, number in zip(images, rows, strict=True) if number}
        return {key: value[:count] for key, value in batch.items() if key not in images} | kept

    def token_mask(self, part: str, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return which tokens of a part's layers carry content.

        Padding of the text doesn't, every image token does.
        """
        return batch["attention_mask"].bool() if part == "language" else None


def _summed(output: Any) -> Tensor:
    """Return the sum of every floating-point tensor of a model's output, however it is nested."""
    if isinstance(output, Tensor):
        return output.float().sum()
    items = output.values() if isinstance(output, Mapping) else output
    return sum((_summed(item) for item in items if item is not None), start=torch.zeros(()))
