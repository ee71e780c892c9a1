"""What a task asks of the machine when a model that writes answers learns it, for `llava-keeplora plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers  # its models, which take seconds to import, are looked up where they are used
from torch import Tensor, nn

from llava_keeplora.errors import ConfigError
from llava_keeplora.models.base import Images, Prepared
from llava_keeplora.models.chat_batch import collate_turns
from llava_keeplora.models.workload import ANSWER, Work, on_meta, repeated
from llava_keeplora_eval.chat import image_inputs
from llava_keeplora_eval.image_inputs import blank_image
from llava_keeplora_eval.llava import batched_tokens, without_defaults
from llava_keeplora_eval.predictors import to_dtype
from llava_keeplora_eval.preparation import ChatPreparation, check_questions
from llava_keeplora_recipes import Example, Recipe, TaskData

#: Tokens of a question with its frame, where there are no data to ask.
QUESTION = 96
#: A word of about one token, and the size of an image (height, width) that is usual in COCO, for the same.
WORD, IMAGE = "what", (480, 640)


class LlavaWorkload:
    """What `LlavaFamily`, its only subclass, reports for a plan; see `Family.workload`, `Family.answer`."""

    model: nn.Module
    config: Any
    preparation: ChatPreparation
    max_length: int
    max_new_tokens: int
    generation: Mapping[str, Any] | None

    def inputs(self, data: TaskData, images: Images) -> Any:
        """Return a split as the model trains on it."""
        raise NotImplementedError

    def prepare(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Return what the model takes for the examples' images."""
        raise NotImplementedError

    def workload(self, recipe: Recipe, train: TaskData | None, test: TaskData | None) -> Work:
        """Return what a task asks of the machine; see `Family.workload`."""
        if train is None or test is None:
            example, question = self._assumed()
            return Work(recipe.name, 0, 0, 0, example, question, {}, 4.0 * ANSWER)
        inputs = self.inputs(train, Prepared(self, train))  # type: ignore[arg-type]
        longest = max(range(len(inputs)), key=lambda i: len(inputs.turns[i]))
        asked = max(check_questions(self.preparation, test), key=len)
        question = batched_tokens([asked], inputs.pad_id) | self.prepare([test[asked.row]])[0]
        said = [len(answers[0]) for answers in test.answers if answers]
        return Work(
            recipe.name,
            len(inputs),
            len(test),
            len(train) + len(test),
            on_meta(inputs.collate([longest])),
            on_meta(question),
            {},
            sum(said) / max(1, len(said)),
        )

    def _assumed(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return an example of one image, a question of `QUESTION` tokens and an answer of `ANSWER`."""
        config = self.config
        if (config.model_type, config.vision_config.model_type) != ("llava", "clip_vision_model"):
            return self._assumed_by_the_processor()
        vision = config.vision_config
        image = (vision.image_size // vision.patch_size) ** 2 + (
            config.vision_feature_select_strategy == "full"
        )
        text = min(QUESTION + ANSWER, self.max_length - image)
        answer = min(ANSWER, text // 2)
        ids = torch.full((1, image + text), config.image_token_id)
        ids[:, image:] = (config.image_token_id + 1) % config.text_config.vocab_size
        labels = torch.full_like(ids, -100)
        labels[:, -answer:] = ids[:, -answer:]
        mask, pixels = (
            torch.ones_like(ids),
            torch.empty(1, 3, vision.image_size, vision.image_size, device="meta"),
        )
        example = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "image_rows": torch.ones(1, 1, dtype=torch.long),
            "pixel_values": pixels,
        }
        return example, {
            "input_ids": ids[:, :-answer],
            "attention_mask": mask[:, :-answer],
            "pixel_values": pixels,
        }

    def _assumed_by_the_processor(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the same for an image of the size `IMAGE`, as the processor makes it."""
        chat = self.preparation.chat
        turn = chat.turn(" ".join([WORD] * QUESTION), [IMAGE], " ".join([WORD] * ANSWER))
        if len(turn) > self.max_length:
            raise ConfigError(
                f"an image of {IMAGE[1]} × {IMAGE[0]} pixels with a question takes {len(turn)} tokens, the "
                f"model takes {self.max_length}, and the data are not there",
                "give the folder that holds them with --data-root",
            )
        images = image_inputs(self.preparation.chat.processor, [blank_image(*IMAGE)])
        prompt = replace(turn, reply=[], extra={k: v[: len(turn.prompt)] for k, v in turn.extra.items()})
        question = batched_tokens([prompt], chat.pad_id) | images
        return on_meta(collate_turns([turn], [images], chat.pad_id)), on_meta(question)

    def answer(self, work: Work, size: int) -> None:
        """Run the two most expensive steps of `LlavaPredictor` on one batch; see `Family.answer`.

        These are the first token of every answer, and the last one, when the key-value cache is longest.
        """
        model: Any = self.model
        config = self.config.get_text_config()
        size *= (self.generation or {}).get("num_beams", 1)
        batch = to_dtype(repeated(work.question, size), model.dtype)
        settings = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=1, pad_token_id=0, eos_token_id=config.vocab_size - 1
        )
        with without_defaults(model):
            model.generate(**batch, generation_config=settings)
        del batch
        for module in model.modules():
            if hasattr(module, "rope_deltas"):  # Positions that multimodal RoPE remembers, of that batch.
                module.rope_deltas = None
        length = min(work.question["input_ids"].shape[1] + self.max_new_tokens, self.max_length) - 1
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = transformers.DynamicCache()
        for layer in range(config.num_hidden_layers):
            cache.update(
                *(torch.zeros(size, heads, length, width, dtype=model.dtype) for _ in range(2)), layer
            )
        ids, mask = torch.zeros(size, 1, dtype=torch.long), torch.ones(size, length + 1, dtype=torch.long)
        model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
