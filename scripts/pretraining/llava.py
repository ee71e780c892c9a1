"""Pre-train the tiny LLaVA: tiny-clip's image encoder, a small Llama, and questions about images."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch
from pretraining.images import SIDE, image_processor
from pretraining.lessons import IMAGE, PATCH, Lessons
from pretraining.training import make_record, train
from pretraining.turns import TaughtSet, taught_sets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

MAX_TOKENS = 512
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# LLaVA-1.5's layout: the images of a message first, then its text.
CHAT = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% for part in parts if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


# ---------------------------------------------------------------------------------------- tokens


def train_tokenizer(sets: list[TaughtSet], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: no text is unknown, and decoding gives back every letter."""
    backend = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = (f"USER: \n{q} ASSISTANT: {a}" for item in sets for turns in item.turns for q, a in turns)
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[*SPECIAL.values(), IMAGE],
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
        extra_special_tokens={"image_token": IMAGE},
        **SPECIAL,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        chat_template=CHAT,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


# ----------------------------------------------------------------------------------------- model


def build_model(tokenizer: PreTrainedTokenizerFast, clip: Path) -> LlavaForConditionalGeneration:
    """Build a small LLaVA whose image encoder is that of a CLIP."""
    teacher = CLIPModel.from_pretrained(clip)
    text = dict(
        model_type="llama",
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=teacher.config.vision_config.to_dict(),
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=(SIDE // PATCH) ** 2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            projector_hidden_act="gelu",
        )
    )
    model.model.vision_tower.load_state_dict(
        {k.removeprefix("vision_model."): v for k, v in teacher.vision_model.state_dict().items()}
    )
    # eager: with bfloat16 on a CPU the backward pass of SDPA is several times slower
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


# -------------------------------------------------------------------------------------- training


def pretrain(args: argparse.Namespace) -> None:
    """Train, save, evaluate, and write down how."""
    started = time.time()
    torch.manual_seed(args.seed)
    sets = taught_sets(args.data_root)
    print(f"{sum(len(s.turns) for s in sets)} images read in {time.time() - started:.0f}s", flush=True)
    tokenizer = train_tokenizer(sets, args.vocabulary)
    model = build_model(tokenizer, args.clip)
    seconds = train(model, Lessons(sets, tokenizer, args.batch, args.seed), args)
    model.save_pretrained(args.out)
    build_processor(tokenizer).save_pretrained(args.out)
    record = make_record(args, sets, model, seconds)
    record["image_encoder"] = {
        "from": args.clip.name,
        "sha256": hashlib.sha256((args.clip / "model.safetensors").read_bytes()).hexdigest(),
    }
    (args.out / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n")
