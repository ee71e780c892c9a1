"""Adapters that plain PEFT trained on real sets, adopted one after the other: with projection and without.

Every adapter is trained on the untouched small CLIP, by PEFT and a bare loop, with no knowledge of the
others. A run then adopts them in order, with KeepLoRA (projected off what is protected) and with sequential
LoRA (as they came). Next to it stands KeepLoRA trained on the sequence itself.

    python scripts/bench_adopt.py --data-root DATA --into runs/adopt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import get_scheduler, set_seed

from llava_keeplora.cli.arguments import whole_numbers
from llava_keeplora.config import RunConfig, load_config
from llava_keeplora.models import load_model
from llava_keeplora.report.results import spread
from llava_keeplora.run_folder import TRAIN, read_record, task_files
from llava_keeplora.sequence import run
from llava_keeplora.sequence.data import ImageCache
from llava_keeplora.start import Task, load_tasks
from llava_keeplora_eval import Matrix

TASKS = ("trashnet", "signdigits", "emoji")
#: Row of the table → the run that it is from, and the label in it.
ROWS = {
    "adopted, projected": ("adopted", "keeplora"),
    "adopted, as they came": ("adopted", "seq-lora"),
    "trained one after the other by KeepLoRA": ("trained", "keeplora"),
}


def train_adapter(config: RunConfig, task: Task, folder: Path) -> None:
    """Train a LoRA on one task by PEFT and a bare loop, with the run's own settings, and save it.

    Args:
        config: the run; its part `vision` has rank and alpha, its `training` the schedule.
        task: the task.
        folder: where PEFT saves the adapter.
    """
    set_seed(config.seed)
    training, part = config.training, config.parts["vision"]
    family = load_model(config.model)
    model = get_peft_model(
        family.model, LoraConfig(r=part.rank, lora_alpha=part.alpha, target_modules=list(part.targets or ()))
    )
    loss_of = family.task(task.recipe)
    inputs = family.inputs(task.train, ImageCache(family.prepare, config.data.cache_gb).split(task.train))
    size = training["per_device_train_batch_size"]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=training["learning_rate"], weight_decay=training["weight_decay"]
    )
    epochs = int(training["num_train_epochs"])
    steps = epochs * -(-len(inputs) // size)
    schedule = get_scheduler("cosine", optimizer, int(training["warmup_steps"] * steps), steps)
    model.train()
    for _ in range(epochs):
        for indices in torch.randperm(len(inputs)).split(size):
            loss_of(**inputs.collate(indices.tolist()))["loss"].backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)


def matrices(seed: int, root: Path, settings: list[str]) -> tuple[dict[str, Matrix], float]:
    """Return row → matrix of one seed, and the mean share of the updates' energy that is taken away.

    What is in the folder already is not computed again.
    """
    common = ["sequence=null", f"tasks=[{', '.join(TASKS)}]", f"seed={seed}", f"base_cache={root / 'cache'}"]
    common += settings
    trained = load_config("real", [*common, f"output_dir={root / f'trained-{seed}'}"], methods=["keeplora"])
    adapters = [root / f"adapters-{seed}" / name for name in TASKS]
    for task, folder in zip(load_tasks(trained), adapters, strict=True):
        if not folder.exists():
            train_adapter(trained, task, folder)
    adopted = load_config(
        "real",
        [
            *common,
            f"output_dir={root / f'adopted-{seed}'}",
            f"adopted=[{', '.join(map(str, adapters))}]",
        ],
    )
    runs = {"trained": run(trained), "adopted": run(adopted)}
    records = task_files(Path(adopted.output_dir) / "keeplora", TRAIN)
    removed = [read_record(path)["adopted"]["removed"] for path in records]
    return {row: runs[which][label] for row, (which, label) in ROWS.items()}, sum(removed) / len(removed)


def main(argv: list[str] | None = None) -> None:
    """Train, adopt, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True, help="the folder with the real sets")
    parser.add_argument("--into", default="runs/adopt", help="folder of adapters and runs")
    parser.add_argument("--seeds", type=whole_numbers, default=[0, 1, 2], metavar="S,...")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="other settings than `real.yaml`'s")
    args = parser.parse_args(argv)
    root, settings = Path(args.into).absolute(), [f"data.root={args.data_root}", *args.settings]
    results = [matrices(seed, root, settings) for seed in args.seeds]
    names = ("transfer", "average", "last", "forgetting")
    lines = [f"| row | {' | '.join(name.capitalize() for name in names)} | {' | '.join(TASKS)} |"]
    lines.append("|---" * (1 + len(names) + len(TASKS)) + "|")
    zero_shot = results[0][0]["adopted, projected"].zero_shot or []
    mean = sum(filter(None, zero_shot)) / len(TASKS)
    lines.append(f"| zero-shot | | | {mean:.1f} | | {' | '.join(f'{score:.1f}' for score in zero_shot)} |")
    for row in ROWS:
        found = [by_row[row] for by_row, _ in results]
        cells = [spread([matrix.metrics()[name] for matrix in found]) for name in names]
        cells += [spread([matrix.rows[-1][index] for matrix in found]) for index in range(len(TASKS))]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")
    shares = ", ".join(f"{100 * removed:.1f} %" for _, removed in results)
    sys.stdout.write(f"energy of the updates that the projection takes away, by seed: {shares}\n")


if __name__ == "__main__":
    main()
