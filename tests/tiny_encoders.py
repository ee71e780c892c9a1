"""Checkpoints of random models with two encoders, of their real architectures and as small as these allow.

Configuration and processor are laid out as those of published checkpoints, and tokenizers have their special tokens,
padding and `model_input_names`; the words are those of the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tiny_models import SIDE, WIDTH, write_clip

#: Of a text, as all SigLIPs have it.
POSITIONS = 64
PATCH = 8
#: The most of an image, where it keeps its shape.
PATCHES = 16


def write_encoders(folder: Path, kind: str, classes: Sequence[str]) -> Path:
    """Write a checkpoint of 2 layers × 32 in both encoders; see `KINDS`."""
    import torch
    import transformers

    words = ["a", "photo", "of", "the", ".", *classes]
    config, image_processor, tokenizer, processor = KINDS[kind](words)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    # Freshly made ones scale by 1; published ones by about 100, and SigLIP's bias is about -13.
    model.logit_scale.data.fill_(3.0)
    if hasattr(model, "logit_bias"):
        model.logit_bias.data.fill_(-2.0)
    model.save_pretrained(folder)
    processor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def write_clipseg(folder: Path, classes: Sequence[str]) -> Path:
    """Write a CLIPSeg, a type that has no record, with CLIP's tokenizer and image processor."""
    import transformers

    known = transformers.CLIPConfig.from_pretrained(write_clip(folder, classes))
    config = transformers.CLIPSegConfig(
        text_config=known.text_config.to_dict(),
        vision_config=known.vision_config.to_dict(),
        projection_dim=16,
    )
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def _siglip(words: Sequence[str]) -> tuple[Any, ...]:
    """SigLIP: `</s>` ends a text and pads it, and no attention mask is made."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, SiglipImageProcessorPil, SiglipProcessor

    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(".", "")])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=POSITIONS,
        model_input_names=["input_ids"],
    )
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return _siglip_config(len(vocab)), images, tokenizer, SiglipProcessor


def _siglip_config(words: int) -> Any:
    from transformers import SiglipConfig

    text = dict(**WIDTH, vocab_size=words, max_position_embeddings=POSITIONS, pad_token_id=1)
    return SiglipConfig(text_config=text, vision_config=dict(**WIDTH, image_size=SIDE, patch_size=PATCH))


def _gemma(words: Sequence[str], tokenizer_class: type, **settings: Any) -> Any:
    """Return a tokenizer of SigLIP 2: Gemma's special tokens, no begin token, padded on the right, no mask."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = sorted({letter for word in words for letter in word} | {"▁"})
    return tokenizer_class(
        vocab={token: i for i, token in enumerate([*special, *letters])},
        merges=[],
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_input_names=["input_ids"],
        **settings,
    )


def _siglip2_fixed(words: Sequence[str]) -> tuple[Any, ...]:
    """SigLIP 2 of a fixed resolution: SigLIP's type, Gemma's tokenizer, which knows no longest text."""
    from transformers import GemmaTokenizer, SiglipImageProcessorPil, SiglipProcessor

    tokenizer = _gemma(words, GemmaTokenizer)
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return _siglip_config(len(tokenizer)), images, tokenizer, SiglipProcessor


def _siglip2(words: Sequence[str]) -> tuple[Any, ...]:
    """SigLIP 2 of variable resolution: images keep their shape, in at most 16 patches.

    Its processor's own call sets patches of 16 pixels, at most 256 of them, whatever the image processor says.
    """
    from transformers import (
        Siglip2Config,
        Siglip2ImageProcessorPil,
        Siglip2Processor,
        Siglip2Tokenizer,
    )

    tokenizer = _gemma(words, Siglip2Tokenizer, model_max_length=POSITIONS)
    text = dict(**WIDTH, vocab_size=len(tokenizer), max_position_embeddings=POSITIONS)
    config = Siglip2Config(
        text_config=text, vision_config=dict(**WIDTH, patch_size=PATCH, num_patches=PATCHES)
    )
    images = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=PATCHES)
    return config, images, tokenizer, Siglip2Processor


def _chinese_clip(words: Sequence[str]) -> tuple[Any, ...]:
    """Chinese-CLIP: a BERT reads the text, with its tokenizer."""
    from transformers import (
        BertTokenizer,
        ChineseCLIPConfig,
        ChineseCLIPImageProcessorPil,
        ChineseCLIPProcessor,
    )

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(
        vocab={word: i for i, word in enumerate([*special, *words])}, model_max_length=32
    )
    config = ChineseCLIPConfig(
        text_config=dict(**WIDTH, vocab_size=len(tokenizer), max_position_embeddings=32),
        vision_config=dict(**WIDTH, image_size=SIDE, patch_size=PATCH),
        projection_dim=16,
    )
    images = ChineseCLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=False
    )
    return config, images, tokenizer, ChineseCLIPProcessor


def _xlm_roberta(words: Sequence[str]) -> Any:
    from transformers import XLMRobertaTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*((token, 0.0) for token in special), *(("▁" + word, -2.0) for word in words)]
    return XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=77)


def _clip_images() -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def _altclip(words: Sequence[str]) -> tuple[Any, ...]:
    """AltCLIP: an XLM-RoBERTa reads the text, with its tokenizer, and counts positions from 2."""
    from transformers import AltCLIPConfig, AltCLIPProcessor

    tokenizer = _xlm_roberta(words)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=34, project_dim=24)
    config = AltCLIPConfig(
        text_config=dict(**WIDTH, **text),
        vision_config=dict(**WIDTH, image_size=SIDE, patch_size=PATCH),
        projection_dim=16,
    )
    return config, _clip_images(), tokenizer, AltCLIPProcessor


def _metaclip2(words: Sequence[str]) -> tuple[Any, ...]:
    """MetaCLIP 2: CLIP's layers, and XLM-RoBERTa's tokenizer."""
    from transformers import CLIPProcessor, MetaClip2Config

    tokenizer = _xlm_roberta(words)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=77, bos_token_id=0, eos_token_id=2)
    config = MetaClip2Config(
        text_config=dict(**WIDTH, **text, pad_token_id=1, projection_dim=16),
        vision_config=dict(**WIDTH, image_size=SIDE, patch_size=PATCH, projection_dim=16),
        projection_dim=16,
    )
    return config, _clip_images(), tokenizer, CLIPProcessor


#: Kind of checkpoint → what makes its configuration, image processor, tokenizer and processor class.
KINDS: dict[str, Callable[[Sequence[str]], tuple[Any, ...]]] = {
    "siglip": _siglip,
    "siglip2-fixed": _siglip2_fixed,
    "siglip2": _siglip2,
    "chinese_clip": _chinese_clip,
    "altclip": _altclip,
    "metaclip_2": _metaclip2,
}

#: How their processors are asked to pad, as the models' documentation says.
PADDING: dict[str, dict[str, Any]] = {
    "siglip": {"padding": "max_length"},
    "siglip2-fixed": {"padding": "max_length", "max_length": POSITIONS},
    "siglip2": {"padding": "max_length", "max_length": POSITIONS},
    "chinese_clip": {"padding": True},
    "altclip": {"padding": True},
    "metaclip_2": {"padding": True},
}

#: What else their processors' own call is given, so that it makes what their image processor says.
IMAGES: dict[str, dict[str, Any]] = {"siglip2": {"patch_size": PATCH, "max_num_patches": PATCHES}}
