"""What a model answers on the test splits without any training on them, and what a guess would get."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pretraining.images import REAL
from pretraining.turns import QUESTIONS
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from llava_keeplora_eval.processors import load_chat_processor
from llava_keeplora_recipes import TaskData, load_recipe, load_split
from llava_keeplora_recipes.rendered import RENDERED
from llava_keeplora_recipes.rendered_scenes import SCENES


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: list[Image.Image],
    asks: list[str],
    longest: int,
) -> list[str]:
    """Greedy answers, each question asked alone."""
    texts = []
    for start in range(0, len(images), 64):
        chats = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}],
                add_generation_prompt=True,
            )
            for q in asks[start : start + 64]
        ]
        batch = processor(text=chats, images=images[start : start + 64], padding=True, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=longest, do_sample=False)
        texts += processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def zero_shot(model: PreTrainedModel, processor: ProcessorMixin, name: str, root: Path, limit: int) -> dict:
    """Exact match on the test split (ROUGE-L for captions), and that of a guess without the image."""
    test, past = (load_split(load_recipe(name), split, root) for split in ("test", "train"))
    if limit < len(test):
        test = test.take(sorted(np.random.default_rng(0).permutation(len(test))[:limit].tolist()))
    asked, right = _texts(test)
    said = answers(model, processor, [e.image for e in test], asked, 96 if name == "flags-captions" else 24)
    guesses = _guesses(test.recipe.kind, *_texts(past), asked)
    score = rouge_l if test.recipe.kind == "captioning" else same
    means = [
        round(float(np.mean([score(text, r) for text, r in zip(texts, right)])), 4)
        for texts in (guesses, said)
    ]
    return {"kind": test.recipe.kind, "examples": len(test), "guess": means[0], "score": means[1]}


def _texts(data: TaskData) -> tuple[list[str], list[list[str]]]:
    """Return the question of each example and its right answer."""
    if data.recipe.kind != "classification":
        return data.questions, data.answers
    return [data.recipe.vlm_prompt] * len(data), [
        [a.replace("_", " ") for a in right] for right in data.answers
    ]


def _guesses(kind: str, past: list[str], right: list[list[str]], asked: list[str]) -> list[str]:
    """Return the most frequent training answer to each question.

    For captions the one that is most like the others.
    """
    if kind == "captioning":
        tried = [r[0] for r in right[:: max(1, len(right) // 40)]]
        return [max(tried, key=lambda text: sum(rouge_l(text, r) for r in right))] * len(asked)
    usual, known = Counter(r[0] for r in right), defaultdict(Counter)
    for question, references in zip(past, right):
        known[question][references[0]] += 1
    return [(known.get(question) or usual).most_common(1)[0][0] for question in asked]


def same(text: str, references: list[str]) -> bool:
    return text.lower().strip(" .") in [r.lower().strip(" .") for r in references]


def rouge_l(text: str, references: list[str]) -> float:
    from pycocoevalcap.rouge.rouge import Rouge  # only the evaluation needs it

    words = [" ".join(re.findall(r"[\w’'-]+", t.lower())) for t in (text, *references)]
    return Rouge().calc_score(words[:1], words[1:])


def evaluate(out: Path, root: Path, limit: int = 300) -> dict[str, dict]:
    """Print and return the zero-shot table of the saved model."""
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(out).eval(),
        load_chat_processor(str(out)),
    )
    table = {}
    print("| task | kind | test examples | guess | zero-shot |\n|---|---|---|---|---|")
    for name in (*SCENES, *RENDERED, *REAL, *QUESTIONS):
        row = table[name] = zero_shot(model, processor, name, root, limit)
        print(
            f"| {name} | {row['kind']} | {row['examples']} | {row['guess']:.3f} | {row['score']:.3f} |",
            flush=True,
        )
    return table
