"""Checkpoints of random models that are as small as their libraries allow; the weights are the same in every run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIDE = 16
#: Task → its classes, in the images that conftest.py draws.
TASKS = {
    "colours": ["red", "green", "blue", "grey"],
    "stripes": ["horizontal", "vertical", "diagonal", "plain"],
    "corners": ["north", "east", "south", "west"],
}
#: The sizes of every part.
WIDTH = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
#: Sizes of images that LLaVA-NeXT and LLaVA-OneVision cut into tiles.
PINS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def write_clip(folder: Path, classes: Sequence[str]) -> Path:
    """Write a CLIP of 2 layers × 32 with 16-pixel images in 8-pixel patches; its words are those of the classes."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPProcessor,
        PreTrainedTokenizerFast,
    )

    # CLIP pools at the end token unless its id is 2, which older checkpoints have by mistake.
    words = ["<pad>", "<start>", "<unk>", "<end>", "a", "photo", "of", "the", ".", *classes]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        model_max_length=12,
    )
    width = dict(**WIDTH, projection_dim=16)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=3)
    config = CLIPConfig(
        text_config=dict(**width, **special, vocab_size=len(words), max_position_embeddings=12),
        vision_config=dict(**width, image_size=SIDE, patch_size=8),
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(image_processor=images, tokenizer=fast).save_pretrained(folder)
    return folder


def write_llava(folder: Path, kind: str = "llava", layer: int = -2) -> Path:
    """Write a LLaVA of vision 2 layers × 32 and language 2 layers × 32: llava, llava_next, or llava_onevision."""
    import torch
    import transformers

    tokenizer = byte_tokenizer()
    text = dict(
        **WIDTH,
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    common = dict(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=layer,
        tie_word_embeddings=False,
    )
    parts = {"llava": _llava, "llava_next": _llava_next}.get(kind, _llava_onevision)
    config, processors = parts(tokenizer, text, common)
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    if kind == "llava_onevision":
        facts = {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 4,
            "vision_feature_select_strategy": "full",
        }
        (folder / "processor_config.json").write_text(json.dumps(facts))
    return folder


def byte_tokenizer() -> Any:
    """Return a tokenizer of single bytes, four special tokens and the image's."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocab = {word: i for i, word in enumerate([*special.values(), "<image>"])}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
    )


def _vision() -> dict[str, Any]:
    return dict(**WIDTH, image_size=SIDE, patch_size=8)


def _cropped() -> dict[str, Any]:
    return dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def _llava(tokenizer: Any, text: dict[str, Any], common: dict[str, Any]) -> tuple[Any, list[Any]]:
    import transformers

    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_vision()),
        text_config=transformers.LlamaConfig(**text),
        **common,
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(**_cropped()),
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        tokenizer=tokenizer,
        patch_size=8,
    )
    return config, [processor]


def _llava_next(tokenizer: Any, text: dict[str, Any], common: dict[str, Any]) -> tuple[Any, list[Any]]:
    import transformers

    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**_vision()),
        text_config=transformers.LlamaConfig(**text),
        image_grid_pinpoints=PINS,
        **common,
    )
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessorPil(**_cropped(), image_grid_pinpoints=PINS),
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        tokenizer=tokenizer,
        patch_size=8,
    )
    return config, [processor]


def _llava_onevision(tokenizer: Any, text: dict[str, Any], common: dict[str, Any]) -> tuple[Any, list[Any]]:
    import transformers

    vision = _vision() | {"hidden_act": "gelu"}
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=transformers.Qwen2Config(**text),
        image_grid_pinpoints=PINS,
        **common | {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    )
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINS
    )
    return config, [tokenizer, images]
