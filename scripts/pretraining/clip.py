"""Pre-train the tiny CLIP: images and the captions of their classes, every batch from all sets."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from pretraining.images import MIRRORED, REAL, SIDE, augment, image_processor, small_images, versions
from tokenizers import models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from llava_keeplora_recipes import load_recipe, load_split
from llava_keeplora_recipes.rendered import RENDERED, captions

MAX_WORDS = 32
NAMES = [*REAL, *RENDERED]


# ----------------------------------------------------------------------------------------- data


@dataclass
class ImageSet:
    """One split of one set in memory. `captions[label][0]` is the classification prompt."""

    name: str
    pixels: torch.Tensor  # uint8, N x 3 x 48 x 48
    labels: torch.Tensor
    captions: list[list[str]]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.pixels.numpy().tobytes())
        digest.update(self.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def load_set(root: Path, name: str, split: str) -> ImageSet:
    data = load_split(load_recipe(name), split, root)
    if name in RENDERED:
        texts = [captions(name, label) for label in range(len(data.recipe.classes))]
    else:
        words = [c.replace("_", " ") for c in data.recipe.classes]
        texts = [
            [p, f"{c}.", f"a small picture: {c}.", f"this shows {c}."]
            for p, c in zip(data.recipe.prompts, words)
        ]
    return ImageSet(name, small_images(data)[0], torch.tensor(data.labels), texts)


def vocabulary_texts(root: Path, sets: list[ImageSet]) -> Iterator[str]:
    """Return what the tokenizer learns from: all captions, and the words of the question sets."""
    for item in sets:
        for texts in item.captions:
            yield from texts * 20
    for path in ("easy_vqa/pretrain.json", "nlvr/pretrain.json", "flags/pretrain_vqa.json"):
        for row in json.loads((root / path).read_text())[:1500]:
            yield from (turn["value"].replace("<image>\n", "") for turn in row["conversations"])
    rows = load_dataset(
        "parquet", data_files={"pretrain": str(root / "emoji/pretrain.parquet")}, split="pretrain"
    )
    yield from rows["name"]


def train_tokenizer(texts: Iterator[str], size: int) -> CLIPTokenizer:
    """Train a byte-level BPE in CLIP's own format; every byte has a token, so no text is unknown."""
    special = {
        "pad_token": "<|pad|>",
        "bos_token": "<|startoftext|>",
        "unk_token": "<|unk|>",
        "eos_token": "<|endoftext|>",
    }
    empty = CLIPTokenizer(vocab={t: i for i, t in enumerate(special.values())}, merges=[], **special)
    backend = empty.backend_tokenizer
    backend.model = models.BPE(end_of_word_suffix="</w>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size - len(alphabet),
            special_tokens=list(special.values()),
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    state = json.loads(backend.to_str())["model"]
    vocab = dict(sorted(state["vocab"].items(), key=lambda item: item[1]))
    for letter in alphabet:
        vocab.setdefault(letter + "</w>", len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_WORDS, **special)


# ---------------------------------------------------------------------------------------- model


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    return CLIPModel(
        CLIPConfig(
            text_config=dict(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=MAX_WORDS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            vision_config=dict(
                hidden_size=160,
                intermediate_size=640,
                num_hidden_layers=4,
                num_attention_heads=5,
                image_size=SIDE,
                patch_size=8,
            ),
            projection_dim=128,
        )
    )


def image_embeddings(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)


def text_embeddings(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return F.normalize(model.get_text_features(**batch).pooler_output.float(), dim=-1)


def contrastive_loss(logits: torch.Tensor, targets: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Return CLIP's loss where many images share one caption.

    Args:
        logits: scaled similarities, images x captions (one caption per class of every set).
        targets: the caption of each image.
        owner: the set that each caption belongs to.

    Picture to caption: cross-entropy against the captions of its own set, and against all of them.
    Caption to image: for captions with images in the batch, all of them are equally right.
    """
    foreign = owner[targets][:, None] != owner[None, :]
    own = F.cross_entropy(logits.masked_fill(foreign, -1e4), targets)
    everything = F.cross_entropy(logits, targets)
    right = F.one_hot(targets, logits.shape[1]).T.float()
    present = right.sum(1) > 0
    share = right[present] / right[present].sum(1, keepdim=True)
    back = -(share * logits.T[present].log_softmax(1)).sum(1).mean()
    return own + 0.5 * everything + 0.25 * back


def train(sets: list[ImageSet], tokenizer: CLIPTokenizer, args: argparse.Namespace) -> CLIPModel:
    model = build_model(tokenizer)
    decay = [p for p in model.parameters() if p.ndim > 1]
    without_decay = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": without_decay, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, args.lr, total_steps=args.steps, pct_start=0.08, cycle_momentum=False
    )
    pixels = torch.cat([s.pixels for s in sets])
    first_class = np.cumsum([0] + [len(s.captions) for s in sets])
    targets = torch.cat([s.labels + int(start) for s, start in zip(sets, first_class)])
    texts = [options for s in sets for options in s.captions]
    owner = torch.cat([torch.full((len(s.captions),), i) for i, s in enumerate(sets)])
    mirrored = torch.cat([torch.full((len(s.labels),), s.name in MIRRORED) for s in sets])
    # Large sets are seen less often per image, rendered ones (easier) less often still.
    chance = torch.cat(
        [
            torch.full(
                (len(s.labels),),
                (0.4 if s.name in RENDERED else 1.0) * min(len(s.labels), 1500) ** 0.5 / len(s.labels),
            )
            for s in sets
        ]
    )
    started, running = time.time(), None
    model.train()
    for step in range(args.steps):
        chosen = torch.multinomial(chance, args.batch, replacement=False)
        pick = torch.rand(len(texts)), torch.rand(len(texts))
        words = [
            options[0] if plain_prompt < 0.6 else options[int(which * len(options))]
            for options, plain_prompt, which in zip(texts, *(p.tolist() for p in pick))
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            seen = image_embeddings(model, augment(pixels[chosen], mirrored[chosen]))
            said = text_embeddings(model, tokenizer, words)
        logits = model.logit_scale.clamp(max=4.6).exp() * seen @ said.T
        loss = contrastive_loss(logits, targets[chosen], owner)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if step % 20 == 19 or step + 1 == args.steps:
            spent = time.time() - started
            left = spent / (step + 1) * (args.steps - step - 1)
            print(
                f"step {step + 1}/{args.steps}  loss {running:.3f}  {spent:.0f}s gone, {left:.0f}s to go",
                flush=True,
            )
    return model.eval()


# ----------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def zero_shot(model: CLIPModel, processor: CLIPProcessor, data: ImageSet) -> dict[str, float]:
    """Test accuracy with the classification prompts, and what the most frequent class would get."""
    said = text_embeddings(model, processor.tokenizer, [options[0] for options in data.captions])
    guesses = torch.cat(
        [
            (image_embeddings(model, part.float() / 127.5 - 1) @ said.T).argmax(1)
            for part in data.pixels.split(256)
        ]
    )
    chance = max(Counter(data.labels.tolist()).values()) / len(data.labels)
    accuracy = (guesses == data.labels).float().mean().item()
    return {
        "accuracy": round(accuracy, 4),
        "chance": round(chance, 4),
        "classes": len(data.captions),
        "images": len(data.labels),
    }


def evaluate(out: Path, root: Path) -> dict[str, dict[str, float]]:
    """Print and return the zero-shot table of the saved model."""
    model, processor = CLIPModel.from_pretrained(out).eval(), CLIPProcessor.from_pretrained(out)
    table = {name: zero_shot(model, processor, load_set(root, name, "test")) for name in NAMES}
    print("| task | classes | test images | chance | zero-shot accuracy |\n|---|---|---|---|---|")
    for name, row in table.items():
        print(
            f"| {name} | {row['classes']} | {row['images']} | {row['chance']:.3f} | {row['accuracy']:.3f} |"
        )
    return table


def pretrain(args: argparse.Namespace) -> None:
    """Train, save, evaluate, and write down how."""
    started = time.time()
    torch.manual_seed(args.seed)
    sets = [load_set(args.data_root, name, "pretrain") for name in NAMES]
    print(f"{sum(len(s.labels) for s in sets)} images read in {time.time() - started:.0f}s", flush=True)
    tokenizer = train_tokenizer(vocabulary_texts(args.data_root, sets), args.vocabulary)
    model = train(sets, tokenizer, args)
    model.save_pretrained(args.out)
    CLIPProcessor(image_processor=image_processor(), tokenizer=tokenizer).save_pretrained(args.out)
    record = {
        "recipe": {k: getattr(args, k) for k in ("steps", "batch", "lr", "vocabulary", "seed", "bf16")},
        "pretrain_sets": {s.name: {"images": len(s.labels), "sha256": s.fingerprint()} for s in sets},
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.time() - started),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "zero_shot_test": evaluate(args.out, args.data_root),
    }
    (args.out / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n")
