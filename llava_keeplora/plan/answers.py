"""Prediction of one batch by a model without weights, to measure the peak memory of the stage `evaluate`."""

from __future__ import annotations

import torch
import transformers  # its models, which take seconds to import, are looked up where they are used

from llava_keeplora.models import Family
from llava_keeplora.models.llava import LlavaFamily
from llava_keeplora.plan.workload import Work, repeated
from llava_keeplora_eval.llava import without_defaults
from llava_keeplora_eval.predictors import class_logits, image_features, prompt_features


def answer(family: Family, work: Work, size: int) -> None:
    """Answer a batch of `size` copies of a task's longest question, as its predictor does."""
    (_answer_clip if work.prompts else _answer_llava)(family, work, size)


def _answer_clip(family: Family, work: Work, size: int) -> None:
    """Run the steps of `ClipPredictor` on one batch: the prompts' features in pieces, then the images'."""
    model, prompts = family.model, work.prompts
    text = prompt_features(model, prompts)
    images = repeated(work.question, size)
    images["pixel_values"] = images["pixel_values"].to(model.dtype)
    class_logits(model, image_features(model, **images), text)


def _answer_llava(family: LlavaFamily, work: Work, size: int) -> None:
    """Run the two most expensive steps of `LlavaPredictor` on one batch.

    These are the first token of every answer, and the last one, when the key-value cache is longest.
    """
    model, config = family.model, family.config.text_config
    size *= (family.generation or {}).get("num_beams", 1)
    batch = repeated(work.question, size)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=1, pad_token_id=0, eos_token_id=config.vocab_size - 1
    )
    with without_defaults(model):
        model.generate(**batch, generation_config=settings)
    del batch
    length = min(work.question["input_ids"].shape[1] + family.max_new_tokens, family.max_length) - 1
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = transformers.DynamicCache()
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.zeros(size, heads, length, width, dtype=model.dtype) for _ in range(2)), layer)
    ids, mask = torch.zeros(size, 1, dtype=torch.long), torch.ones(size, length + 1, dtype=torch.long)
    model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
