"""A text model that learns three edits of strings in TRL's SFTTrainer, with and without the memory.

    python scripts/bench_text.py runs/text

The base is docs/notebooks/tiny-text (see pretrain_text.py). `lora` is PEFT's plain LoRA, merged after every
task; `keeplora` is `KeepLora` around the same training. Each tries the same learning rates and is measured
at the one with the largest mean of what it knows at the end, of the three tasks and the four edits of the
base, on examples of their own and seed 3; then seeds 0, 1, 2. Scores are exact matches in percent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from pretrain_text import BASE_TASKS, accuracy, encode, examples
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from llava_keeplora import KeepLora

BASE = Path(__file__).parents[1] / "docs/notebooks/tiny-text"
TASKS = ("rotate", "previous", "swap")
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
RANK, STEPS, BATCH, EXAMPLES = 8, 60, 32, 960
#: Examples are drawn by seed: those of training and test, and of validation, are of different ones.
TEST, VALIDATION = 1000, 2000


def train(model, tokenizer, task: str, learning_rate: float, seed: int, folder: Path) -> None:
    """Train a task in SFTTrainer."""
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        seed=seed,
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=STEPS,
        disable_tqdm=True,
    )
    data = Dataset.from_list(examples(task, EXAMPLES, seed))
    SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer).train()


def scores(model, tokenizer, split: int, count: int = 200) -> dict[str, float]:
    """Return the accuracy of every task and of the base's edits on test or validation examples."""
    model.eval()
    score = {task: accuracy(model, tokenizer, examples(task, count, split)) for task in (*TASKS, *BASE_TASKS)}
    return {**{task: score[task] for task in TASKS}, "base": statistics.mean(score[t] for t in BASE_TASKS)}


def run(label: str, learning_rate: float, seed: int, split: int, tasks: Sequence[str], folder: Path):
    """Train the tasks in order; return the scores before the first and after each of them."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    memory = KeepLora(model, rank=RANK, energy_weight=0.5) if label == "keeplora" else None
    rows = [scores(model, tokenizer, split)]
    for task in tasks:
        torch.manual_seed(seed)
        if memory is not None:
            data = examples(task, EXAMPLES, seed)
            batches = [encode(tokenizer, data[i : i + 120]) for i in range(0, EXAMPLES, 120)]
            train(memory.begin_task(batches, name=task), tokenizer, task, learning_rate, seed, folder)
            memory.end_task(batches)
        else:
            adapter = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
            adapted = get_peft_model(model, adapter)
            train(adapted, tokenizer, task, learning_rate, seed, folder)
            model = adapted.merge_and_unload()
        rows.append(scores(model, tokenizer, split))
    return rows


def run_once(folder: Path, label: str, learning_rate: float, seed: int, split: int, tasks=TASKS):
    """Return the rows of `run`, from their file where they have been measured."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{label}-{learning_rate:g}-seed{seed}-{split}-{'-'.join(tasks)}.json"
    if not path.exists():
        rows = run(label, learning_rate, seed, split, tasks, folder / "trainer")
        path.write_text(json.dumps(rows))
    return json.loads(path.read_text())


def measure(folder: Path, label: str, seeds: Sequence[int]) -> tuple[dict, float, list, dict]:
    """Return validation scores by learning rate, the best rate, rows by seed, and the tasks alone."""
    tuning = {rate: run_once(folder, label, rate, 3, VALIDATION)[-1] for rate in LEARNING_RATES}
    best = max(tuning, key=lambda rate: statistics.mean(tuning[rate].values()))
    rows = [run_once(folder, label, best, seed, TEST) for seed in seeds]
    alone = {task: run_once(folder, label, best, 0, TEST, (task,))[-1][task] for task in TASKS[1:]}
    return tuning, best, rows, {TASKS[0]: rows[0][1][TASKS[0]], **alone}


def main() -> None:
    """Tune, run the seeds, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for label in ("lora", "keeplora"):
        sys.stdout.write(f"{label}\n{table(*measure(arguments.folder, label, (0, 1, 2)))}\n")


def table(tuning: dict, best: float, seeds: list, alone: dict) -> str:
    """Return tuning, matrix (mean and sample deviation over the seeds) and bounds in Markdown."""
    columns = (*TASKS, "base")
    lines = [("", *columns), ("---",) * (len(columns) + 1)]
    for rate, row in tuning.items():
        chosen = " (chosen)" if rate == best else ""
        lines.append((f"validation, lr {rate:g}{chosen}", *(f"{row[c]:.1f}" for c in columns)))
    for i, after in enumerate(("zero-shot", *TASKS)):
        cells = [[rows[i][c] for rows in seeds] for c in columns]
        spread = [f" ± {statistics.stdev(cell):.1f}" if i else "" for cell in cells]
        lines.append((after, *(f"{statistics.mean(cell):.1f}{s}" for cell, s in zip(cells, spread))))
    lines.append(("alone", *(f"{alone[task]:.1f}" for task in TASKS), "-"))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
