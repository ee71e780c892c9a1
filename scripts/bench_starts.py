"""Processor time (user and system) that each command needs to start, however busy the machine is.

The inputs are made in a temporary folder, and nothing is downloaded. `train` is stopped when its first stage
has begun, at the first line of a journal; `plan` runs to its end.

    python scripts/bench_starts.py --repeats 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from bench_processes import run_command

from llava_keeplora_eval import Matrix
from llava_keeplora_recipes import load_recipe, load_split

TRAIN, EVAL = "llava-keeplora", "llava-keeplora-eval"
MODULES = {TRAIN: "llava_keeplora.cli", EVAL: "llava_keeplora_eval.cli"}
#: `train` on one task, because a start renders or reads the images of all tasks.
BEGINNING = f"{TRAIN} train --config demo --output-dir run sequence=null tasks=[shapes]"
COMMANDS = (
    f"{TRAIN} --help",
    f"{TRAIN} list",
    f"{TRAIN} doctor run",
    f"{EVAL} data check shapes",
    f"{EVAL} score --task shapes --predictions answers.jsonl",
    f"{EVAL} matrix matrix.json",
    f"{TRAIN} plan --config demo sequence=null tasks=[shapes]",
    BEGINNING,
)


def main() -> None:
    """Measure every command and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="starts, of which the median is printed (default: 3)"
    )
    parser.add_argument(
        "words", nargs="*", help="measure only the commands that hold one of these words, for instance `list`"
    )
    args = parser.parse_args()
    chosen = [command for command in COMMANDS if not args.words or set(args.words) & set(command.split())]
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        print("| command | s of processor time |\n|---|---|")
        for command in chosen:
            seconds = [processor_seconds(command, Path(folder)) for _ in range(args.repeats)]
            print(f"| `{command}` | {statistics.median(seconds):.2f} |", flush=True)


def write_inputs(folder: Path) -> None:
    """Write a file of answers, a matrix and the beginning of a run."""
    data = load_split(load_recipe("shapes"), "test")
    answers = [{"question_id": name, "text": data.recipe.classes[0]} for name in data.ids]
    (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    Matrix(["a", "b"], [1.0, 2.0], [[3.0, 4.0], [5.0, 6.0]]).to_json(folder / "matrix.json")
    processor_seconds(BEGINNING, folder)


def processor_seconds(command: str, folder: Path) -> float:
    """Run a command in a folder, `train` only until its first stage, and return its processor seconds.

    Raises:
        SystemExit: the command failed.
    """
    program, *words = command.split()
    inside = (
        Path(tempfile.mkdtemp(dir=folder)) if command == BEGINNING and (folder / "run").exists() else folder
    )
    return run_command(
        [sys.executable, "-m", MODULES[program], *words],
        inside,
        (lambda: any(inside.glob("run/*/journal.jsonl"))) if command == BEGINNING else None,
    ).cpu


if __name__ == "__main__":
    main()
