"""Pre-train the small text model of docs/notebooks: a Llama of 0.6 million parameters that edits lists.

    python scripts/pretrain_text.py docs/notebooks/tiny-text

An example is an instruction, five letters, digits or words, and the answer: `reverse b a d c e = e c d a b`.
The base is taught the edits of `BASE_TASKS`. Those of `NEW_TASKS` have an instruction in its vocabulary that
it has never seen, and are left to be learned. Two minutes of one core.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "old": "new",
    "fast": "slow",
    "up": "down",
    "left": "right",
    "day": "night",
    "wet": "dry",
    "hard": "soft",
    "rich": "poor",
    "near": "far",
    "open": "shut",
}
BACK = {second: first for first, second in OPPOSITES.items()}
ITEMS = {
    "letters": list("abcdefghijklmnopqrstuvwxyz"),
    "digits": list("0123456789"),
    "words": [word for pair in OPPOSITES.items() for word in pair],
}
Edit = Callable[[list[str]], list[str]]


def shift(kind: str, by: int) -> Edit:
    """Return the edit that replaces every item by a later one of its kind, the first following the last."""
    items = ITEMS[kind]
    return lambda line: [items[(items.index(item) + by) % len(items)] for item in line]


#: Instruction and kind → what it makes of items of the kind.
BASE_TASKS: dict[str, Edit] = {
    **{f"copy {kind}": lambda line: line for kind in ITEMS},
    **{f"reverse {kind}": lambda line: line[::-1] for kind in ITEMS},
    "next letters": shift("letters", 1),
    "next digits": shift("digits", 1),
    "upper letters": lambda line: [item.upper() for item in line],
}
NEW_TASKS: dict[str, Edit] = {
    "previous letters": shift("letters", -1),
    "opposite words": lambda line: [(OPPOSITES | BACK)[item] for item in line],
    "rotate digits": lambda line: [*line[1:], line[0]],
}
LENGTH = 5


def examples(task: str, count: int, seed: int) -> list[dict[str, str]]:
    """Return examples of a task in the columns of TRL, `prompt` and `completion`."""
    rng = random.Random(f"{task} {seed}")
    instruction, kind = task.split()
    edit = (BASE_TASKS | NEW_TASKS)[task]
    lines = [rng.choices(ITEMS[kind], k=LENGTH) for _ in range(count)]
    return [
        {"prompt": f"{instruction} {' '.join(line)} =", "completion": f" {' '.join(edit(line))}"}
        for line in lines
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words: items, capitals, instructions and a sign."""
    items = [item for kind in ITEMS.values() for item in kind]
    instructions = dict.fromkeys(task.split()[0] for task in BASE_TASKS | NEW_TASKS)
    words = ["<pad>", "<s>", "</s>", "=", *items, *map(str.upper, ITEMS["letters"]), *instructions]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return the model with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Return a batch whose labels are the answers and the end of the sequence."""
    texts = [row["prompt"] + row["completion"] + " " + tokenizer.eos_token for row in rows]
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    labels = ids.clone()
    labels[:, : LENGTH + 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@torch.no_grad()
def accuracy(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> float:
    """Return the percentage of answers that are right as a whole, each token being the likeliest one.

    With the right tokens before it given, which is what greedy decoding gives as long as it is right.
    """
    batch = encode(tokenizer, rows)
    guesses = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    labels = batch["labels"][:, 1:]
    right = (guesses[:, :-1] == labels) | (labels == -100)
    return 100 * float(right.all(dim=1).float().mean())


def pretrain(steps: int, batch_size: int = 90, learning_rate: float = 3e-3, seed: int = 0):
    """Return the tokenizer and the model after its pre-training."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for step in range(steps):
        rows = [
            row for task in BASE_TASKS for row in examples(task, batch_size // len(BASE_TASKS), seed=step)
        ]
        loss = model(**encode(tokenizer, rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            sys.stdout.write(f"step {step + 1}: loss {loss:.3f}, {time.process_time():.0f} s\n")
            sys.stdout.flush()
    return tokenizer, model.eval()


def main() -> None:
    """Pre-train, print the accuracies, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    arguments = parser.parse_args()
    tokenizer, model = pretrain(arguments.steps)
    for task in BASE_TASKS | NEW_TASKS:
        sys.stdout.write(f"{task}: {accuracy(model, tokenizer, examples(task, 200, seed=-1)):.1f} %\n")
    model.half().save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
