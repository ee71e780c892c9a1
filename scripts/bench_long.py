"""A run of many tasks: what each stage, a start and the report take as the tasks grow more.

    python scripts/bench_long.py            # 30 tasks, minutes
    python scripts/bench_long.py --tasks 12
    python scripts/bench_long.py --method "{method: task-lora, rejection: 0.05}"

KeepLoRA on the embedded CLIP learns small rendered tasks of 16 training and 16 test images, one epoch each.
The first table has the seconds of processor time of every stage of some tasks of the longest run. The second
one has those of runs of that many tasks: to the first stage, of all that follows the last one (tables and
report), of a second start, which finds nothing to do, and of the command `report`. The scoring and the
report may grow with the number of tasks, because all of them are scored; nothing may grow faster.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from bench_processes import Usage, run_command

from llava_keeplora_recipes.rendered import RENDERED, render

SCRIPTS = Path(__file__).parent
#: The rendered tasks whose images the tasks share; every one has a part of its own.
SOURCES = ("shapes", "textures", "glyphs", "counting", "relations")
IMAGES = 16
STAGES = ("PREPARED", "TRAINED", "CONSOLIDATED", "EVALUATED", "CLOSED")


def write_tasks(folder: Path, count: int) -> list[str]:
    """Write tasks as folders of images with a recipe each, and return the recipes' names."""
    files = []
    for number in range(count):
        source, part = SOURCES[number % len(SOURCES)], number // len(SOURCES)
        spec, name = RENDERED[source], f"{source}-{number + 1:02d}"
        for split in ("train", "test"):
            for index in range(part * IMAGES, (part + 1) * IMAGES):
                image, label, _ = render(source, split, index)
                path = folder / name / split / spec.classes[label].replace(" ", "_") / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
        classes = sorted({path.name for path in (folder / name).glob("*/*")})
        recipe = {
            "name": name,
            "version": 1,
            "kind": "classification",
            "prompt": spec.prompt,
            "metric": "accuracy",
            "licence": "rendered",
            "source": {"format": "imagefolder", "path": name},
            "splits": {"train": "train", "test": "test"},
            "classes": classes,
        }
        files.append(f"{name}.yaml")
        (folder / files[-1]).write_text(json.dumps(recipe))
    return files


def train(folder: Path, tasks: list[str], method: str) -> tuple[Usage, list[list]]:
    """Run or resume a run of tasks; return what it took, and what its stages took."""
    output = f"run-{len(tasks)}"
    usage = run_command(
        [
            sys.executable,
            str(SCRIPTS / "staged.py"),
            "train",
            "--config=real",
            f"--data-root={folder}",
            "--output-dir",
            output,
            "sequence=null",
            f"tasks=[{','.join(tasks)}]",
            f"methods={{row: {method}}}",
            "training.num_train_epochs=1",
        ],
        folder,
        threads=1,
    )
    return usage, json.loads((folder / output / "stages.json").read_text())


def stage_rows(taken: list[list], shown: list[int]) -> list[list[str]]:
    """Return a row for each stage: its seconds in some of the tasks."""
    seconds: dict[tuple[str, int], float] = defaultdict(float)
    for label, task, stage, value in taken:
        if label == "row":
            seconds[stage, task] += value
    return [[stage, *(f"{seconds[stage, task]:.2f}" for task in shown)] for stage in STAGES]


def print_table(first: str, shown: list[int], rows: list[list[str]]) -> None:
    """Print rows as a Markdown table."""
    print(f"| {first} | {' | '.join(map(str, shown))} |\n|{'---|' * (len(shown) + 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def main() -> None:
    """Run sequences of a sixth, a half and all of the tasks, and print what they took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=30, help="number of tasks (default: 30)")
    parser.add_argument(
        "--method", default="{method: keeplora}", help="a method as in `methods` (default: %(default)s)"
    )
    args = parser.parse_args()
    shown = sorted({max(1, args.tasks // 6), max(1, args.tasks // 2), args.tasks})
    rows: dict[str, list[str]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks = write_tasks(folder, args.tasks)
        for count in shown:
            usage, taken = train(folder, tasks[:count], args.method)
            again, _ = train(folder, tasks[:count], args.method)
            report = run_command(
                [sys.executable, "-m", "llava_keeplora.cli", "report", f"run-{count}"], folder, threads=1
            )
            rows["the whole run"].append(f"{usage.cpu:.1f}")
            rows["up to its first stage"].append(f"{taken[0][3]:.2f}")
            rows["after its last stage"].append(f"{taken[-1][3]:.2f}")
            rows["a second start"].append(f"{again.cpu:.2f}")
            rows["`report`"].append(f"{report.cpu:.2f}")
            print(f"{count} tasks: {usage.cpu:.1f} s of processor time", file=sys.stderr, flush=True)
    print_table("processor s of a stage, in task", shown, stage_rows(taken, shown))
    print_table("processor s, of tasks", shown, [[name, *values] for name, values in rows.items()])


if __name__ == "__main__":
    main()
