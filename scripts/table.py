"""Run a configuration over seeds and task orders, then print mean ± sd of every method.

    python scripts/table.py --config real --orders real-order1 real-order2 --seeds 0 1 2 --data-root DATA

Each run has its own folder and goes on where it stopped, so the same command finishes an interrupted table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava_keeplora.report.run_report import read_results
from llava_keeplora.report.tables import COLUMNS, summary_table
from llava_keeplora_eval import Matrix

METRICS = tuple(COLUMNS.values())


def train(args: argparse.Namespace, order: str, seed: int) -> Path:
    """Run (or go on with) one seed of one order in a process of its own."""
    folder = Path(args.output) / args.config / f"{order}-seed{seed}"
    command = [sys.executable, str(Path(__file__).parent / "train_seq.py"), "--config", args.config, "--output-dir", str(folder)]
    command += ["--data-root", args.data_root] if args.data_root else []
    command += [f"sequence={order}", f"seed={seed}", *args.overrides]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return folder


def numbers(matrix: Matrix) -> dict[str, float]:
    """The headline metrics of one matrix; a method that trains nothing keeps its zero-shot row."""
    values = (matrix if matrix.started else matrix.constant_zero_shot()).metrics()
    return {name: values[name] for name in METRICS}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--orders", nargs="+", required=True, help="sequences")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-root")
    parser.add_argument("--output", default="runs/table")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out")
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", metavar="KEY=VALUE")
    args = parser.parse_args()
    jobs = [(order, seed) for seed in args.seeds for order in args.orders]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = dict(zip(jobs, pool.map(lambda job: train(args, *job), jobs)))
    for order in args.orders:
        found = [read_results(folders[order, seed]) for seed in args.seeds]
        results = {label: [matrices[label] for matrices in found] for label in found[0]}
        table = {label: {name: [numbers(matrix)[name] for matrix in matrices] for name in METRICS} for label, matrices in results.items()}
        (Path(args.output) / args.config / f"{order}.json").write_text(json.dumps(table, indent=1))
        sys.stdout.write(f"\n{order}, seeds {args.seeds}\n\n{summary_table(results)}")


if __name__ == "__main__":
    main()
