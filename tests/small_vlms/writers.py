"""One function for each model type: its configuration, tokenizer and image processor at the smallest sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from . import templates

TEXT = ["What is it? a cat, a dog, red blue green; the answer is: yes or no. Who is in the picture"] * 3
LANGUAGE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=1024,
)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def make_tokenizer(special: Sequence[str], **roles: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of a type first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=len(special) + len(alphabet) + 24,
            initial_alphabet=alphabet,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)


def save(
    folder: Path,
    config,
    tokenizer: PreTrainedTokenizerFast,
    image_processor: Mapping[str, Any],
    template: str | None,
    processor: Mapping[str, Any],
    stops: Sequence[str] = (),
    nested: bool = False,
    videos: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint's files in the layout of the Hub's.

    Args:
        folder: where to.
        config: the model's configuration.
        tokenizer: its tokenizer.
        image_processor: what preprocessor_config.json says.
        template: chat_template.jinja.
        processor: what processor_config.json says besides, `processor_class` included.
        stops: end tokens of generation_config.json.
        nested: whether the image processor's settings stand in processor_config.json, as transformers 5 writes.
        videos: what video_preprocessor_config.json says.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # Some types begin with zeros somewhere, which no gradient passes.
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    # Weights of the usual scale answer everything alike.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    model.generation_config.eos_token_id = (
        tokenizer.convert_tokens_to_ids(list(stops)) or tokenizer.eos_token_id
    )
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    own = dict(processor) | ({"image_processor": dict(image_processor)} if nested else {})
    (folder / "processor_config.json").write_text(json.dumps(own))
    if not nested:
        own = dict(image_processor) | {"processor_class": processor["processor_class"]}
        (folder / "preprocessor_config.json").write_text(json.dumps(own))
    if videos is not None:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    return folder


def _ids(tokenizer: PreTrainedTokenizerFast, **tokens: str) -> dict[str, int]:
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in tokens.items()}


def _clip_images(side: int, kind: str = "CLIPImageProcessor") -> dict[str, Any]:
    return {
        "image_processor_type": kind,
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }


def _siglip_images(side: int) -> dict[str, Any]:
    return {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": side, "width": side},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _llama_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(
        ["<unk>", "<s>", "</s>", "<pad>", "<image>", *more],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def _chatml_tokenizer(*more: str, **roles: Any) -> PreTrainedTokenizerFast:
    return make_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        **roles,
    )


def _text(kind: str, tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        **LANGUAGE,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": False,
        **more,
    }


def llava(folder: Path) -> Path:
    tokenizer = _llama_tokenizer()
    config = transformers.LlavaConfig(
        text_config=_text("llama", tokenizer),
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 28, "patch_size": 14},
        **_ids(tokenizer, image_token_id="<image>"),
    )
    more = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return save(folder, config, tokenizer, _clip_images(28), templates.LLAVA, more)


def llava_interleave(folder: Path) -> Path:
    """LLaVA with SigLIP and Qwen2; llava-hf/llava-interleave-qwen-0.5b-hf."""
    tokenizer = _chatml_tokenizer("<image>", extra_special_tokens={"image_token": "<image>"})
    config = transformers.LlavaConfig(
        text_config=_text("qwen2", tokenizer),
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **_ids(tokenizer, image_token_id="<image>"),
    )
    more = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
    }
    return save(folder, config, tokenizer, _siglip_images(28), templates.QWEN_IMAGES_FIRST, more)


def pixtral(folder: Path) -> Path:
    """LLaVA with Pixtral's encoder; mistral-community/pixtral-12b."""
    tokenizer = make_tokenizer(
        ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    config = transformers.LlavaConfig(
        text_config=_text("mistral", tokenizer),
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 8, "image_size": 56, "patch_size": 14},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **_ids(tokenizer, image_token_id="[IMG]"),
    )
    images = {
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": 56},
        "patch_size": {"height": 14, "width": 14},
    }
    more = {"processor_class": "PixtralProcessor", "patch_size": 14, "image_token": "[IMG]"}
    return save(folder, config, tokenizer, images, templates.PIXTRAL, more)


def llava_next(folder: Path) -> Path:
    tokenizer = _llama_tokenizer("[INST]", "[/INST]")
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = transformers.LlavaNextConfig(
        text_config=_text("mistral", tokenizer),
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 28, "patch_size": 14},
        image_grid_pinpoints=pinpoints,
        **_ids(tokenizer, image_token_id="<image>"),
    )
    more = {
        "processor_class": "LlavaNextProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    images = _clip_images(28, "LlavaNextImageProcessor") | {"image_grid_pinpoints": pinpoints}
    return save(folder, config, tokenizer, images, templates.LLAVA_MISTRAL, more)


def llava_onevision(folder: Path) -> Path:
    tokenizer = _chatml_tokenizer(
        "<image>", "<video>", extra_special_tokens={"image_token": "<image>", "video_token": "<video>"}
    )
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56], [84, 84]]
    config = transformers.LlavaOnevisionConfig(
        text_config=_text("qwen2", tokenizer),
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
        **_ids(tokenizer, image_token_id="<image>", video_token_id="<video>"),
    )
    more = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 4,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_2",
    }
    images = _siglip_images(28) | {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_grid_pinpoints": pinpoints,
    }
    videos = _siglip_images(28) | {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    return save(folder, config, tokenizer, images, templates.ONEVISION, more, videos=videos)


def vipllava(folder: Path) -> Path:
    """No chat template, as on the Hub."""
    tokenizer = _llama_tokenizer()
    config = transformers.VipLlavaConfig(
        text_config=_text("llama", tokenizer),
        vision_config={
            "model_type": "clip_vision_model",
            **VISION,
            "num_hidden_layers": 3,
            "image_size": 28,
            "patch_size": 14,
        },
        vision_feature_layers=[-2, -3],
        **_ids(tokenizer, image_token_id="<image>"),
    )
    more = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return save(folder, config, tokenizer, _clip_images(28), None, more)


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    vision = [
        f"<|{name}|>" for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    ]
    return _chatml_tokenizer(*vision)


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return _ids(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )


def _qwen_images(patch: int) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 4 * patch * patch,
        "max_pixels": 16 * patch * patch,
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }


def _mrope(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return LANGUAGE | {
        "vocab_size": len(tokenizer),
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        **more,
    }


def qwen2_vl(folder: Path) -> Path:
    tokenizer = _qwen_tokenizer()
    config = transformers.Qwen2VLConfig(
        text_config=_mrope(tokenizer),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=14),
        **_qwen_ids(tokenizer),
    )
    more = {"processor_class": "Qwen2VLProcessor"}
    stops = ("<|im_end|>", "<|endoftext|>")
    return save(folder, config, tokenizer, _qwen_images(14), templates.QWEN2_VL, more, stops)


def qwen2_5_vl(folder: Path) -> Path:
    tokenizer = _qwen_tokenizer()
    config = transformers.Qwen2_5_VLConfig(
        text_config=_mrope(tokenizer),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=4,
            out_hidden_size=32,
            patch_size=14,
            window_size=56,
            fullatt_block_indexes=[1],
        ),
        **_qwen_ids(tokenizer),
    )
    more = {"processor_class": "Qwen2_5_VLProcessor"}
    stops = ("<|im_end|>", "<|endoftext|>")
    return save(folder, config, tokenizer, _qwen_images(14), templates.QWEN2_VL, more, stops)


def qwen3_vl(folder: Path) -> Path:
    """With deepstack, whose mergers feed the first layers of the language model."""
    tokenizer = _qwen_tokenizer()
    config = transformers.Qwen3VLConfig(
        # The last layer sends nothing back from the places of images, where deepstack adds.
        text_config=_mrope(tokenizer, num_hidden_layers=3),
        vision_config=dict(
            depth=3,
            hidden_size=32,
            intermediate_size=48,
            num_heads=4,
            out_hidden_size=32,
            patch_size=16,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        **_qwen_ids(tokenizer),
    )
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = _qwen_images(16) | half | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    more = {"processor_class": "Qwen3VLProcessor"}
    stops = ("<|im_end|>", "<|endoftext|>")
    videos = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"shortest_edge": 2 * 4 * 16 * 16, "longest_edge": 2 * 16 * 16 * 16},  # of two frames
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    return save(folder, config, tokenizer, images, templates.QWEN3_VL, more, stops, videos=videos)


def internvl(folder: Path) -> Path:
    tokenizer = _chatml_tokenizer(
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
        "<video>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    config = transformers.InternVLConfig(
        text_config=_text("qwen2", tokenizer),
        vision_config={
            "model_type": "internvl_vision",
            **VISION,
            "image_size": [28, 28],
            "patch_size": [14, 14],
            "layer_scale_init_value": 0.5,
        },
        image_seq_length=1,
        downsample_ratio=0.5,
        **_ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 28, "width": 28},
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 3,
    }
    more = {"processor_class": "InternVLProcessor", "image_seq_length": 1}
    videos = {
        "video_processor_type": "InternVLVideoProcessor",
        "size": {"height": 28, "width": 28},
    }
    return save(folder, config, tokenizer, images, templates.INTERNVL, more, videos=videos)


def paligemma(folder: Path) -> Path:
    """No chat template; a suffix is what is learned."""
    tokenizer = make_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"],
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    # The processor adds 1152 tokens for places and segments.
    more_tokens = 1024 + 128
    config = transformers.PaliGemmaConfig(
        text_config=_text("gemma", tokenizer) | {"vocab_size": len(tokenizer) + more_tokens},
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 32,
            "num_image_tokens": 4,
            "vision_use_head": False,
        },
        projection_dim=32,
        **_ids(tokenizer, image_token_index="<image>", image_token_id="<image>"),
    )
    images = _siglip_images(28) | {"image_seq_length": 4}
    return save(folder, config, tokenizer, images, None, {"processor_class": "PaliGemmaProcessor"})


def gemma3(folder: Path) -> Path:
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = make_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>", *names.values(), "<start_of_turn>", "<end_of_turn>"],
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=names,
    )
    config = transformers.Gemma3Config(
        text_config=_text("gemma3_text", tokenizer) | {"sliding_window": 64, "query_pre_attn_scalar": 8},
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": 28,
            "patch_size": 7,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        **_ids(
            tokenizer,
            image_token_id="<image_soft_token>",
            boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>",
        ),
    )
    images = _siglip_images(28) | {"image_processor_type": "Gemma3ImageProcessor", "do_pan_and_scan": None}
    more = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    return save(folder, config, tokenizer, images, templates.GEMMA3, more, ("<eos>", "<end_of_turn>"))


def _idefics(folder: Path, config_class, start: str, stop: str, processor: str, kind: str) -> Path:
    tiles = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    tokenizer = make_tokenizer(
        [
            start,
            stop,
            "<pad>",
            "<fake_token_around_image>",
            "<image>",
            "<global-img>",
            "<end_of_utterance>",
            *tiles,
        ],
        bos_token=start,
        eos_token=stop,
        pad_token="<pad>",
    )
    config = config_class(
        text_config=_text("llama", tokenizer),
        vision_config={**VISION, "image_size": 28, "patch_size": 7},
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        **_ids(tokenizer, image_token_id="<image>"),
    )
    images = {
        "image_processor_type": f"{processor.removesuffix('Processor')}ImageProcessor",
        "size": {"longest_edge": 56},
        "max_image_size": {"longest_edge": 28},
        "do_image_splitting": kind == "smolvlm",
        "do_pad": True,
        "do_convert_rgb": True,
    }
    more = {"processor_class": processor, "image_seq_len": 4}
    template = templates.IDEFICS3.replace("START", repr(start))
    videos = {
        "video_processor_type": "SmolVLMVideoProcessor",
        "size": {"longest_edge": 56},
        "max_image_size": {"longest_edge": 28},
    }
    stops = (stop, "<end_of_utterance>")
    return save(
        folder,
        config,
        tokenizer,
        images,
        template,
        more,
        stops,
        videos=videos if kind == "smolvlm" else None,
    )


def idefics3(folder: Path) -> Path:
    start, stop = "<|begin_of_text|>", "<|end_of_text|>"
    return _idefics(folder, transformers.Idefics3Config, start, stop, "Idefics3Processor", "idefics3")


def smolvlm(folder: Path) -> Path:
    """With image splitting."""
    start, stop = "<|im_start|>", "<|im_end|>"
    return _idefics(folder, transformers.SmolVLMConfig, start, stop, "SmolVLMProcessor", "smolvlm")


#: Name → function (folder) → the folder with the checkpoint.
SMALL_VLMS: Mapping[str, Callable[[Path], Path]] = {
    writer.__name__: writer
    for writer in (
        llava,
        llava_interleave,
        pixtral,
        llava_next,
        llava_onevision,
        vipllava,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        internvl,
        paligemma,
        gemma3,
        idefics3,
        smolvlm,
    )
}


def write_small_vlm(name: str, folder: Path) -> Path:
    """Write a small checkpoint of a type and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return SMALL_VLMS[name](folder)
