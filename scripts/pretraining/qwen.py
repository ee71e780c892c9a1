"""Pre-train the tiny Qwen-VL: Qwen2.5-VL's architecture at its smallest, and questions about images."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from pretraining.distil import distil
from pretraining.images import augment
from pretraining.lessons import LONGEST_ANSWER, Lessons
from pretraining.training import make_record, train
from pretraining.turns import TaughtSet, taught_sets
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

PATCH, MERGE, FRAMES = 8, 2, 2
#: Pixels of an image, at least and at most: squares become 48 x 48, and 4:3 becomes 64 x 48.
PIXELS = {"shortest_edge": 48 * 48, "longest_edge": 48 * 64}
MAX_TOKENS = 512
END, PAD = "<|im_end|>", "<|endoftext|>"
#: Qwen2.5-VL's, in its order.
SPECIAL = [
    PAD,
    "<|im_start|>",
    END,
    *(f"<|{kind}_{side}|>" for kind in ("object_ref", "box", "quad", "vision") for side in ("start", "end")),
    *(f"<|{kind}_pad|>" for kind in ("vision", "image", "video")),
]
IMAGE = "<|image_pad|>"
BEGIN, MIDDLE = "<|im_start|>user\n<|vision_start|>", f"{END}\n<|im_start|>assistant\n"
#: How Qwen2's tokenizer splits a text before it merges bytes.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
#: ChatML with images where the message has them; as Qwen3-VL, without a system message of its own.
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif content['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ---------------------------------------------------------------------------------------- tokens


def train_tokenizer(sets: list[TaughtSet], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen's own split and special tokens."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        (f"user\n{q}\nassistant\n{a}" for item in sets for turns in item.turns for q, a in turns),
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
            min_frequency=3,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=MAX_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        eos_token=END,
        pad_token=PAD,
    )


def image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        size=PIXELS,
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=FRAMES,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def save_processor(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write what Qwen2.5-VL's processor is put together of.

    The processor itself can only be made with torchvision, which its part for videos needs.
    """
    tokenizer.save_pretrained(out)
    (out / "chat_template.jinja").write_text(CHAT)
    settings = image_processor().to_dict() | {"processor_class": "Qwen2_5_VLProcessor"}
    settings["image_processor_type"] = "Qwen2VLImageProcessor"
    (out / "preprocessor_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


# ----------------------------------------------------------------------------------------- model


def _multiply(embed: nn.Module, cut: torch.Tensor) -> torch.Tensor:
    return F.linear(cut, embed.proj.weight.flatten(1))


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """Build a small Qwen2.5-VL with new weights."""
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Columns have the lowest frequencies; with a base this small three columns differ all the same.
        rope_parameters={"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]},
    )
    vision = dict(
        depth=4,
        hidden_size=128,
        intermediate_size=320,
        num_heads=4,
        out_hidden_size=192,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=FRAMES,
        window_size=48,
        fullatt_block_indexes=[1, 3],
    )
    names = {
        "image_token_id": IMAGE,
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text,
            tie_word_embeddings=True,
            **{key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()},
        )
    )
    # A convolution whose patches don't overlap is a product, which is ten times as fast on a CPU.
    model.model.visual.patch_embed.forward = MethodType(_multiply, model.model.visual.patch_embed)
    # eager: with bfloat16 on a CPU the backward pass of SDPA is several times slower
    model.set_attn_implementation("eager")
    model.generation_config.bos_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


# -------------------------------------------------------------------------------------- training


def patches(pixels: torch.Tensor) -> torch.Tensor:
    """Cut images (N x 3 x height x width) into patches, in the order of the image processor.

    The patches of a square of merged ones follow each other; an image stands in for every frame.
    """
    n, channels, height, width = pixels.shape
    side = PATCH * MERGE
    cut = pixels.reshape(n, channels, height // side, MERGE, PATCH, width // side, MERGE, PATCH)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    return cut.expand(*cut.shape[:6], FRAMES, PATCH, PATCH).reshape(-1, channels * FRAMES * PATCH**2)


class QwenLessons(Lessons):
    """Batches for a Qwen-VL: images of their own aspect ratio, packed patches, positions of three axes."""

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width in which the image processor shows an image."""
        low, high = PIXELS["shortest_edge"], PIXELS["longest_edge"]
        return smart_resize(*self.shapes[index], PATCH * MERGE, low, high)

    def prefix(self, index: int) -> tuple[list[int], torch.Tensor, int]:
        height, width = (side // (PATCH * MERGE) for side in self.size(index))
        begin, image, end = (self.tokenizer(text).input_ids for text in (BEGIN, IMAGE, "<|vision_end|>"))
        at = len(begin)
        row, column = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
        after = at + max(height, width)
        positions = [
            torch.arange(at).expand(3, -1),
            at + torch.stack([torch.zeros_like(row), row, column]),
            torch.full((3, 1), after),
        ]
        return begin + image * (height * width) + end, torch.cat(positions, dim=1), after + 1

    def turn(self, question: str, answer: str) -> tuple[list[int], int]:
        asked = self.tokenizer(question + MIDDLE).input_ids
        said = [*self.tokenizer(answer).input_ids[: LONGEST_ANSWER - 1], self.tokenizer.eos_token_id]
        return asked + said, len(asked)

    def images(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes = [self.size(row) for row in rows.tolist()]
        cut: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for size in sorted(set(sizes)):
            members = [i for i, other in enumerate(sizes) if other == size]
            some = rows[members]
            seen = augment(self.pixels[some], self.mirrored[some], self.moved[some], size)
            for i, part in zip(members, patches(seen).chunk(len(members)), strict=True):
                cut[i] = part
        grids = [[1, height // PATCH, width // PATCH] for height, width in sizes]
        return {"pixel_values": torch.cat(cut), "image_grid_thw": torch.tensor(grids)}


def pretrain(args: argparse.Namespace) -> None:
    """Train, save, evaluate, and write down how."""
    started = time.time()
    torch.manual_seed(args.seed)
    sets = taught_sets(args.data_root)
    print(f"{sum(len(s.turns) for s in sets)} images read in {time.time() - started:.0f}s", flush=True)
    tokenizer = train_tokenizer(sets, args.vocabulary)
    model = build_model(tokenizer)
    lessons = QwenLessons(sets, tokenizer, args.batch, args.seed)
    encoder = distil(model, lessons, patches, args)
    seconds = train(model, lessons, args)
    model.save_pretrained(args.out)
    save_processor(tokenizer, args.out)
    record = make_record(args, sets, model, seconds) | {"image_encoder": encoder}
    (args.out / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n")
