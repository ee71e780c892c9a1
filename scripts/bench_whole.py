"""Whole tasks, from the start of a process to its end, beside what a user would run instead.

    python scripts/bench_whole.py --data-root DATA                           # against a plain script
    python scripts/bench_whole.py --data-root DATA --released CHECKOUT/MTIL  # and the authors' code

First, one task (trashnet, one epoch, the embedded CLIP; layers, rank, rate and batch as in `real`): a script
of transformers' Trainer and PEFT (`plain_lora.py`), and `llava-keeplora train` with sequential LoRA and with
KeepLoRA, each with its score before and after. With `--released`, also two tasks (trashnet, signdigits): the
released code (`released_tasks.py`) and KeepLoRA, with what their stages take. All take turns. Medians are
printed, of wall time and of processor time of the process and its children, which other work on the machine
affects less, and of the ratios within a turn, with their range. `--python` names the interpreter that has the
packages of the released code.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench_processes import Usage, in_turns, median, run_command

from llava_keeplora.config import load_config
from llava_keeplora.models import ASSETS
from llava_keeplora_recipes import load_recipe

SCRIPTS = Path(__file__).parent
ONE, TWO = ("trashnet",), ("trashnet", "signdigits")
METHODS = ("seq-lora", "keeplora")
#: Stage of the run → the row of the table that holds it, and the released code's names of the same work.
PARTS = {
    "start": "start",
    "zero-shot": "zero-shot",
    "PREPARED": "gradient and A",
    "TRAINED": "training",
    "CONSOLIDATED": "features and bases",
    "EVALUATED": "scoring",
}
RELEASED = {
    "start": "start",
    "zero-shot": "zero-shot",
    "gradient": "gradient and A",
    "A": "gradient and A",
    "training": "training",
    "features": "features and bases",
    "bases": "features and bases",
    "weights": "features and bases",
    "scoring": "scoring",
}


class Setting:
    """The settings that all contenders share.

    Args:
        data_root: the folder with the real sets.
        epochs: of every task.
        threads: of every process.
        folder: for their outputs.
    """

    def __init__(self, data_root: str, epochs: int, threads: int, folder: Path):
        self.data_root, self.epochs, self.threads, self.folder = data_root, epochs, threads, folder
        config = load_config("real", [f"data.root={data_root}"])
        self.training, self.parts = config.training, config.parts
        self.rank = self.parts["vision"].rank

    def new_folder(self) -> Path:
        """Return a folder for one more process."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def run(self, *command: str, python: str = sys.executable, folder: Path | None = None) -> Usage:
        """Run a Python command in a new folder; see `run_command`."""
        return run_command([python, *command], folder or self.new_folder(), threads=self.threads)

    def common(self) -> list[str]:
        """Return the options that the plain script and the released code share."""
        return [
            f"--model={ASSETS / 'tiny-clip'}",
            f"--epochs={self.epochs}",
            f"--batch={self.training['per_device_train_batch_size']}",
            f"--rate={self.training['learning_rate']}",
            f"--rank={self.rank}",
            "--output=output",
        ]

    def task(self, name: str) -> dict[str, object]:
        """Return a set's folder, classes and prompt."""
        recipe = load_recipe(name)
        data = str(Path(self.data_root).resolve() / recipe.source["path"])
        return {"data": data, "classes": list(recipe.classes), "prompt": recipe.prompt.replace("{c}", "{}")}

    def plain(self, name: str) -> Usage:
        """Run the plain script on a task."""
        task = self.task(name)
        words = [f"--data={task['data']}", f"--prompt={task['prompt']}", "--classes", *task["classes"]]
        return self.run(str(SCRIPTS / "plain_lora.py"), *self.common(), *words)

    def ours(
        self, method: str, tasks: tuple[str, ...], stages: dict[str, list[float]] | None = None
    ) -> Usage:
        """Run `llava-keeplora train`; into `stages` goes what each part of the run took."""
        command = ["-m", "llava_keeplora.cli"] if stages is None else [str(SCRIPTS / "staged.py")]
        folder = self.new_folder()
        usage = self.run(
            *command,
            "train",
            "--config=real",
            f"--data-root={Path(self.data_root).resolve()}",
            "--output-dir",
            "run",
            "sequence=null",
            f"tasks=[{','.join(tasks)}]",
            f"methods={{{method}: {{}}}}",
            f"training.num_train_epochs={self.epochs}",
            folder=folder,
        )
        if stages is not None:
            add_stages(stages, our_stages(folder), usage.cpu)
        matrices = json.loads((folder / "run" / "results.json").read_text())["methods"]
        matrix = matrices[method]["matrix"]
        return usage._replace(
            output=json.dumps({"zero_shot": matrix["zero_shot"], "last": matrix["rows"][-1]})
        )

    def released(self, code: str, python: str, stages: dict[str, list[float]]) -> Usage:
        """Run the released code on two tasks; into `stages` goes what each part took."""
        words = [
            f"--code={Path(code).resolve()}",
            f"--tasks={json.dumps([self.task(name) for name in TWO])}",
            f"--energy-feature={self.parts['vision'].energy_feature}",
            "--energy-weight",
            *(str(self.parts[part].energy_weight) for part in ("vision", "text")),
        ]
        usage = self.run(str(SCRIPTS / "released_tasks.py"), *self.common(), *words, python=python)
        answer = json.loads(usage.output.splitlines()[-1])
        taken: dict[str, float] = defaultdict(float)
        for name, seconds in answer["stages"].items():
            taken[RELEASED.get(name, "other")] += seconds
        add_stages(stages, taken, usage.cpu)
        return usage._replace(output=json.dumps(answer))


def our_stages(folder: Path) -> dict[str, float]:
    """Return row of the table → seconds of processor time of a run with `staged.py`."""
    taken: dict[str, float] = defaultdict(float)
    for _, index, stage, seconds in json.loads((folder / "run" / "stages.json").read_text()):
        name = "zero-shot" if stage == "EVALUATED" and not index else stage
        taken[PARTS.get(name, "other")] += seconds
    return taken


def add_stages(stages: dict[str, list[float]], taken: dict[str, float], whole: float) -> None:
    """Add one run's stages to those of the others; what they leave of the whole is `other`."""
    for name in dict.fromkeys([*PARTS.values(), "other"]):
        rest = whole - sum(seconds for key, seconds in taken.items() if key != "other")
        stages.setdefault(name, []).append(rest if name == "other" else taken.get(name, 0.0))


def print_table(taken: dict[str, list[Usage]], base: str) -> None:
    """Print medians, and ratios to one of the contenders, as a Markdown table.

    A ratio is the median of those within a turn, with their range.
    """
    medians = {name: median(usages) for name, usages in taken.items()}
    print(f"| | processor s | of {base}'s | wall s | of {base}'s | score before | after |\n|{'---|' * 7}")
    for name, usage in medians.items():
        scores = json.loads(usage.output.splitlines()[-1])
        before, after = (
            ", ".join(f"{score:.1f}" for score in (value if isinstance(value, list) else [value]))
            for value in (scores["zero_shot"], scores["last"])
        )
        turns = list(zip(taken[name], taken[base], strict=True))
        cpu = ratio([own.cpu / other.cpu for own, other in turns])
        wall = ratio([own.wall / other.wall for own, other in turns])
        print(
            f"| {name} | {usage.cpu:.1f} | {cpu} | {usage.wall:.1f} | {wall} | {before} | {after} |",
            flush=True,
        )


def ratio(turns: Sequence[float]) -> str:
    """Return the median of some ratios with their range."""
    return f"{statistics.median(turns):.2f} ({min(turns):.2f} to {max(turns):.2f})"


def main() -> None:
    """Run all contenders in turns, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True, help="the folder with the real sets")
    parser.add_argument("--repeats", type=int, default=5, help="turns, of which medians count (default: 5)")
    parser.add_argument("--epochs", type=int, default=1, help="of every task (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of every process (default: 1)")
    parser.add_argument("--released", metavar="FOLDER", help="MTIL in a checkout of the released code")
    parser.add_argument("--python", default=sys.executable, help="the interpreter for the released code")
    parser.add_argument("--only-released", action="store_true", help="skip the comparison of one task")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(args.data_root, args.epochs, args.threads, Path(folder))
        if not args.only_released:
            contenders = {"plain script": partial(setting.plain, *ONE)}
            contenders |= {name: partial(setting.ours, name, ONE) for name in METHODS}
            print_table(in_turns(contenders, args.repeats), "plain script")
        if args.released:
            stages: dict[str, dict[str, list[float]]] = {"released code": {}, "keeplora": {}}
            contenders = {
                "released code": partial(
                    setting.released, args.released, args.python, stages["released code"]
                ),
                "keeplora": partial(setting.ours, "keeplora", TWO, stages["keeplora"]),
            }
            print_table(in_turns(contenders, args.repeats), "keeplora")
            print(f"\n| processor s of | {' | '.join(stages)} |\n|{'---|' * (len(stages) + 1)}")
            for name in stages["keeplora"]:
                cells = (f"{statistics.median(taken[name]):.1f}" for taken in stages.values())
                print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
