"""Pre-train the tiny LLaVA: tiny-clip's image encoder, a small Llama, and questions about pictures."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pretraining.lessons import IMAGE, PATCH, SHARES, Lessons
from pretraining.pictures import SIDE, image_processor, versions
from pretraining.turns import TaughtSet, taught_sets
from pretraining.zero_shot import evaluate
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
# LLaVA-1.5's layout: the pictures of a message first, then its text.
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


def answer_losses(
    model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor], bf16: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token of an answer: its cross-entropy, and whether it is predicted right."""
    inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"][:, 1:]
    said = labels != -100
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[said]).float()
    return F.cross_entropy(logits, labels[said], reduction="none"), logits.argmax(-1) == labels[said]


class Training:
    """A model with its optimiser and schedule, and how far they are.

    Can be written down and taken up again.
    """

    def __init__(self, model: LlavaForConditionalGeneration, args: argparse.Namespace) -> None:
        self.model, self.bf16 = model, args.bf16
        self.step, self.seconds = 0, 0.0
        decay = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, args.lr, total_steps=args.steps, pct_start=0.06, cycle_momentum=False
        )

    def learn(self, parts: list[dict[str, torch.Tensor]]) -> np.ndarray:
        """Train one step and return the loss per token and the share of tokens predicted right."""
        count = sum(int((part["labels"] != -100).sum()) for part in parts)
        total = np.zeros(2)
        self.optimiser.zero_grad()
        for part in parts:
            losses, right = answer_losses(self.model, part, self.bf16)
            (losses.sum() / count).backward()
            total += losses.sum().item(), right.sum().item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.step += 1
        return total / count

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimiser", "schedule")}
        torch.save(state | {"step": self.step, "seconds": self.seconds}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name in ("model", "optimiser", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]


def train(model: LlavaForConditionalGeneration, lessons: Lessons, args: argparse.Namespace) -> float:
    """Train in place, taking up what `--work` holds; returns the seconds that the steps took."""
    run = Training(model.train(), args)
    saved = args.work / "checkpoint.pt" if args.work else None
    if saved and saved.exists():
        run.load(saved)
    started, written, running = time.time() - run.seconds, time.time(), None
    while run.step < args.steps:
        now = run.learn(list(lessons(run.step)))
        running = now if running is None else 0.95 * running + 0.05 * now
        run.seconds = time.time() - started
        if run.step % 20 == 0 or run.step == args.steps:
            left = run.seconds / run.step * (args.steps - run.step)
            print(
                f"step {run.step}/{args.steps}  loss {running[0]:.3f}  tokens right {running[1]:.3f}  "
                f"{run.seconds:.0f}s gone, {left:.0f}s to go",
                flush=True,
            )
        if saved and (time.time() - written > 180 or run.step == args.steps):
            run.save(saved)
            written = time.time()
    model.eval()
    return run.seconds


def pretrain(args: argparse.Namespace) -> None:
    """Train, save, evaluate, and write down how."""
    started = time.time()
    torch.manual_seed(args.seed)
    sets = taught_sets(args.data_root)
    print(f"{sum(len(s.turns) for s in sets)} pictures read in {time.time() - started:.0f}s", flush=True)
    tokenizer = train_tokenizer(sets, args.vocabulary)
    model = build_model(tokenizer, args.clip)
    seconds = train(model, Lessons(sets, tokenizer, args.batch, args.seed), args)
    model.save_pretrained(args.out)
    build_processor(tokenizer).save_pretrained(args.out)
    record = {
        "recipe": {k: getattr(args, k) for k in ("steps", "batch", "lr", "vocabulary", "seed", "bf16")},
        "shares": SHARES,
        "image_encoder": {
            "from": args.clip.name,
            "sha256": hashlib.sha256((args.clip / "model.safetensors").read_bytes()).hexdigest(),
        },
        "pretrain_sets": {
            s.name: {"images": len(s.turns), "turns": sum(map(len, s.turns)), "sha256": s.fingerprint()}
            for s in sets
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "zero_shot_test": evaluate(args.out, args.data_root),
    }
    (args.out / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n")
