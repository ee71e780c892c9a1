"""A small random CLIP, two small tasks, and a configuration of a run, for checks without a network."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import yaml

from llava_keeplora_recipes.registry import Registry

CLASSES = ("red", "green", "blue")
SIDE = 16


def write_small_clip(folder: Path) -> Path:
    """Write a random CLIP as a checkpoint and return its folder.

    Each encoder has two layers of width 32; images have 16 x 16 pixels, in patches of 8.
    """
    import tokenizers
    import transformers
    from tokenizers import models, pre_tokenizers, processors

    words = ["<pad>", "<start>", "<unk>", "<end>", "a", "photo", "of", ".", *CLASSES]
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        model_max_length=12,
    )
    encoder = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    config = transformers.CLIPConfig(
        text_config=encoder | special | {"vocab_size": len(words), "max_position_embeddings": 12},
        vision_config=encoder | {"image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def write_small_tasks(folder: Path) -> list[Path]:
    """Write two tasks of coloured images as image folders and return their recipes.

    Each has 12 training examples and 6 test examples.
    """
    from PIL import Image

    recipes = []
    for number, name in enumerate(("bright", "dark")):
        for split, count in (("train", 4), ("test", 2)):
            for label, colour in enumerate(CLASSES):
                (folder / name / split / colour).mkdir(parents=True)
                for index in range(count):
                    levels = [40, 40, 40]
                    levels[label] = 240 - 90 * number - 10 * index - 5 * (split == "test")
                    image = Image.new("RGB", (SIDE, SIDE), tuple(levels))
                    image.save(folder / name / split / colour / f"{index}.png")
        recipe = {
            "name": name,
            "version": 1,
            "kind": "classification",
            "prompt": "a photo of {c} .",
            "metric": "accuracy",
            "licence": "CC0-1.0",
            "classes": list(CLASSES),
            "source": {"format": "imagefolder", "path": name},
            "splits": {"train": "train", "test": "test"},
        }
        recipes.append(folder / f"{name}.yaml")
        recipes[-1].write_text(yaml.safe_dump(recipe))
    return recipes


def small_run(folder: Path) -> dict[str, Any]:
    """Write the small CLIP and the two tasks; return a run's configuration as plain data, without methods."""
    part = {"rank": 2, "alpha": 2, "energy_weight": 0.5, "energy_feature": 0.9}
    return {
        "output_dir": str(folder / "run"),
        "tasks": [str(recipe) for recipe in write_small_tasks(folder / "tasks")],
        "model": {"name_or_path": str(write_small_clip(folder / "clip"))},
        "parts": {"vision": part, "text": dict(part)},
        "training": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "use_cpu": True,
        },
    }


def registered_name(value: str | type, registry: Registry) -> str:
    """Return the name of an object in configurations: its registered name, or `FILE.py:NAME`."""
    if isinstance(value, str):
        return value
    for name in registry:
        if registry[name] is value:
            return name
    return f"{inspect.getsourcefile(value)}:{value.__qualname__}"
