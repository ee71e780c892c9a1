"""A text model that learns three edits of lists in TRL's SFTTrainer, with and without the memory.

    python scripts/bench_text.py runs/text

The base is docs/notebooks/tiny-text (see pretrain_text.py). Rows: `lora` is PEFT's LoRA task after task,
merged after each; `keeplora` is `KeepLora` around the same training; the bounds are `individual`, every task
alone by LoRA, and `joint`, all three at once by LoRA. Every row tries three settings and is measured at the
one with the largest mean of its end's four columns (the three tasks, and the nine edits of the base as one),
on examples of their own and seed 3; then seeds 0, 1, 2. Scores are exact matches in percent. Results that the
folder holds are not computed again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from pretrain_text import BASE_TASKS, NEW_TASKS, accuracy, encode, examples
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from llava_keeplora import KeepLora

BASE = Path(__file__).parents[1] / "docs/notebooks/tiny-text"
TASKS, KNOWN = tuple(NEW_TASKS), "base"
RANK, STEPS, BATCH, EXAMPLES = 8, 80, 32, 960
SEEDS = (0, 1, 2)
#: Examples are drawn by seed: those of training and test, and of validation, are of different ones.
TEST, VALIDATION, VALIDATION_SEED = 1000, 2000, 3


@dataclass(frozen=True)
class Setting:
    """What a row is tuned in; ε_w for the memory alone."""

    learning_rate: float
    energy_weight: float | None = None

    def __str__(self) -> str:
        energy = "" if self.energy_weight is None else f", ε_w {self.energy_weight:g}"
        return f"rate {self.learning_rate:g}{energy}"


LORA = tuple(Setting(rate) for rate in (1e-3, 3e-3, 1e-2))
ROWS: dict[str, tuple[Setting, ...]] = {
    "lora": LORA,
    "keeplora": (Setting(1e-2, 0.5), Setting(1e-2, 0.9), Setting(2e-2, 0.5)),
    "individual": LORA,
    "joint": LORA,
}
#: Rows that are no sequence.
BOUNDS = ("individual", "joint")
Scores = dict[str, float]


class Bench:
    """Measure rows, once each.

    Args:
        folder: where results are kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(BASE)

    def run(self, row: str, setting: Setting, seed: int, split: int) -> list[Scores]:
        """Return a row's scores after each of its trainings, from their file where there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        energy = "" if setting.energy_weight is None else f"-{setting.energy_weight:g}"
        path = self.folder / f"{row}-{setting.learning_rate:g}{energy}-seed{seed}-{split}.json"
        if not path.exists():
            rows = [self.scores(model, split) for model in self.models(row, setting, seed)]
            path.write_text(json.dumps(rows))
        return json.loads(path.read_text())

    def models(self, row: str, setting: Setting, seed: int) -> Iterator[torch.nn.Module]:
        """Yield a row's model after each of its trainings."""
        model = memory = None
        for tasks in [TASKS] if row == "joint" else [[task] for task in TASKS]:
            if model is None or row == "individual":
                model, energy = load_base(), setting.energy_weight
                memory = KeepLora(model, rank=RANK, energy_weight=energy) if energy else None
            if memory is None:
                torch.manual_seed(seed)  # Of LoRA's A.
                adapter = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
                adapted = get_peft_model(model, adapter)
                self.train(adapted, tasks, setting, seed)
                model = adapted.merge_and_unload()
            else:
                data = examples(tasks[0], EXAMPLES, seed)
                batches = [encode(self.tokenizer, data[i : i + 120]) for i in range(0, EXAMPLES, 120)]
                self.train(memory.begin_task(batches, name=tasks[0]), tasks, setting, seed)
                model = memory.end_task(batches)
            yield model

    def train(self, model: Any, tasks: Sequence[str], setting: Setting, seed: int) -> None:
        """Train tasks together in SFTTrainer, `STEPS` for each."""
        arguments = SFTConfig(
            output_dir=str(self.folder / "trainer"),
            max_steps=STEPS * len(tasks),
            per_device_train_batch_size=BATCH,
            learning_rate=setting.learning_rate,
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
        data = Dataset.from_list([row for task in tasks for row in examples(task, EXAMPLES, seed)])
        SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=self.tokenizer).train()

    def scores(self, model: torch.nn.Module, split: int) -> Scores:
        """Return the accuracy on every task, and the mean over the base's edits."""
        model.eval()
        known = [accuracy(model, self.tokenizer, examples(task, 40, split)) for task in BASE_TASKS]
        tasks = {task: accuracy(model, self.tokenizer, examples(task, 200, split)) for task in TASKS}
        return {**tasks, KNOWN: statistics.mean(known)}

    def tune(self, row: str) -> tuple[dict[Setting, Scores], Setting]:
        """Return the validation scores at a row's end by setting, and the best setting."""
        ends = {
            setting: end(row, self.run(row, setting, VALIDATION_SEED, VALIDATION)) for setting in ROWS[row]
        }
        return ends, max(ends, key=lambda setting: statistics.mean(ends[setting].values()))

    def report(self) -> str:
        """Return the tables in Markdown: the rows' ends, their matrices, and what was tuned."""
        ends = [("zero-shot", [summary([self.scores(load_base(), TEST)])])]
        after, tuning = [], []
        for row in ROWS:
            validation, best = self.tune(row)
            for setting, scores in validation.items():
                tuning.append((f"{row}, {setting}{' (chosen)' * (setting == best)}", [scores]))
            runs = [self.run(row, best, seed, TEST) for seed in SEEDS]
            ends.append((row, [summary([end(row, rows)] if row in BOUNDS else rows) for rows in runs]))
            if row not in BOUNDS:
                after += [(f"{row}, {task}", [rows[i] for rows in runs]) for i, task in enumerate(TASKS)]
        tables = {"row": ends, "after": after, "on validation": tuning}
        return "\n".join(table(title, lines) for title, lines in tables.items())


def load_base() -> torch.nn.Module:
    """Return the base in float32."""
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def end(row: str, rows: list[Scores]) -> Scores:
    """Return a row's scores at its end: of each task's own model where it learns alone, else of the last."""
    if row != "individual":
        return rows[-1]
    return {
        **{task: scores[task] for task, scores in zip(TASKS, rows, strict=True)},
        KNOWN: statistics.mean(scores[KNOWN] for scores in rows),
    }


def summary(rows: list[Scores]) -> Scores:
    """Return the last scores, their mean over the tasks, and the drop of earlier tasks from their best."""
    last = rows[-1]
    lost = [max(scores[task] for scores in rows) - last[task] for task in TASKS[:-1]]
    forgetting = {"Forgetting": statistics.mean(lost)} if len(rows) > 1 else {}
    return {**last, "Last": statistics.mean(last[task] for task in TASKS), **forgetting}


def table(title: str, lines: Sequence[tuple[str, list[Scores]]]) -> str:
    """Return lines of scores, as mean ± sample deviation where there are several, in Markdown."""
    columns = list(dict.fromkeys(column for _, samples in lines for column in samples[0]))
    cells = [[title, *columns], ["---"] * (len(columns) + 1)]
    for name, samples in lines:
        values = [[scores[column] for scores in samples if column in scores] for column in columns]
        cells.append([name, *map(mean_and_deviation, values)])
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return mean ± sample deviation, the mean alone of one value, a dash for none."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    """Tune, run the seeds, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    sys.stdout.write(Bench(parser.parse_args().folder).report())


if __name__ == "__main__":
    main()
