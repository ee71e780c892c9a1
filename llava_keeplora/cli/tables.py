"""Commands that compare results: `reproduce`, `compare`, `ablate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_keeplora.cli.arguments import (
    add_command,
    add_methods,
    add_run_arguments,
    add_settings,
    numbers,
    process_count,
    whole_numbers,
)
from llava_keeplora.cli.run_sequence import load_run_config, prepared_process, print_summary

if TYPE_CHECKING:
    from llava_keeplora.compare import Table, TableResult
    from llava_keeplora.config import RunConfig


def add_reproduce(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `reproduce` and return its parser."""
    parser = add_command(
        commands,
        "reproduce",
        "run a configuration and compare its scores with published ones",
        run_reproduce,
        resumes=True,
    )
    parser.add_argument(
        "config",
        metavar="NAME|FILE.yaml",
        help="a shipped configuration, for instance mtil-order1, or a YAML file with `expected`",
    )
    add_settings(parser)
    add_methods(parser)
    parser.add_argument("--output-dir", help="the run folder (output_dir)")
    return parser


def add_compare(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `compare` and return its parser."""
    parser = add_command(
        commands,
        "compare",
        "run or resume methods × seeds × orders of tasks, and write the table",
        run_compare,
        resumes=True,
    )
    add_run_arguments(parser)
    add_methods(parser)
    add_table_arguments(parser)
    return parser


def add_ablate(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `ablate` and return its parser."""
    parser = add_command(
        commands,
        "ablate",
        "remove KeepLoRA's parts one at a time, sweep its thresholds, and write the table",
        run_ablate,
        resumes=True,
    )
    add_run_arguments(parser)
    add_table_arguments(parser)
    parser.add_argument(
        "--energy-weights",
        type=numbers,
        metavar="E,...",
        help="values of ε_w to try, the same in every part (default: 0.5,0.6,0.7,0.8,0.9; '' for none)",
    )
    parser.add_argument(
        "--energy-features",
        type=numbers,
        metavar="E,...",
        help="values of ε_f to try, the same in every part (default: 0.9,0.95,0.99; '' for none)",
    )
    parser.add_argument(
        "--seeds",
        type=whole_numbers,
        metavar="S,...",
        help="of the runs of each variant (default: the configuration's)",
    )
    return parser


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a table of many runs."""
    parser.add_argument("--output-dir", help="the table's folder (output_dir)")
    parser.add_argument(
        "--workers",
        type=process_count,
        default=1,
        metavar="N",
        help="runs at a time; they divide the cores, and each gets one of several GPUs (default: 1)",
    )


def run_reproduce(args: argparse.Namespace) -> None:
    """Run a configuration and compare its scores with the published ones.

    Raises:
        RunError: a score that compares with the published one differs by more than the tolerance.
    """
    from llava_keeplora.errors import RunError
    from llava_keeplora.reproduce import (
        NOT_REPRODUCED,
        check_expected,
        compare,
        comparison,
        differences,
        read_measured,
        write_comparison,
    )
    from llava_keeplora.run_folder import REPRODUCTION

    config = load_run_config(args, output_dir=args.output_dir)
    check_expected(config)
    with prepared_process() as Run:
        run = Run(config)
        scores = run.train()
        print_summary(run, scores)
    reasons = differences(config, read_measured(run.folder), _as_written(args))
    figures = compare(scores, config.expected, reasons)
    if run.is_main_process:
        write_comparison(run.folder / REPRODUCTION, args.config, figures, config.expected)
        sys.stdout.write(f"\npublished and measured, in %\n{comparison(figures, config.expected)}")
        sys.stdout.flush()
    missed = [figure for figure in figures if figure.verdict == NOT_REPRODUCED]
    if missed:
        raise RunError(
            f"{config.output_dir} misses {len(missed)} of {len(figures)} published figures by more than the "
            f"tolerance ({missed[0]})",
            f"check the data with `llava-keeplora-eval data check {config.sequence or config.tasks[0]}`, and "
            "what differs from the published settings",
        )


def _as_written(args: argparse.Namespace) -> RunConfig | None:
    """Return the configuration without the command line's settings, but for those that make it whole.

    None if none of them does.
    """
    from llava_keeplora.config import load_config
    from llava_keeplora.errors import ConfigError
    from llava_keeplora_recipes import load_recipes
    from llava_keeplora_recipes.errors import RecipeError

    def load(overrides: Sequence[str]) -> RunConfig | None:
        try:
            written = load_config(args.config, overrides, methods=args.methods)
            load_recipes(written.tasks)
        except (ConfigError, RecipeError):
            return None
        return written

    needed = list(args.overrides)
    for override in args.overrides:
        others = [other for other in needed if other != override]
        needed = others if load(others) else needed
    return load(needed)


def run_compare(args: argparse.Namespace) -> int:
    """Run a table, or resume it, and write it; return the exit code."""
    from llava_keeplora.compare import compare, draw_tradeoff, load_table, write_table

    table = load_table(args.config, args.overrides, args.data_root, args.output_dir)
    outcome = compare(table, args.workers, args.methods)
    text = ""
    if outcome.results or outcome.tried:
        text = write_table(table, outcome, draw_tradeoff(table, outcome))
    return _print_table(table, outcome, text)


def run_ablate(args: argparse.Namespace) -> int:
    """Run a table of ablations, or resume it, and write it; return the exit code."""
    from llava_keeplora.compare import compare, draw_ablation, load_ablation, write_table

    given = {"energy_weight": args.energy_weights, "energy_feature": args.energy_features}
    thresholds = {name: values for name, values in given.items() if values is not None}
    ablation = load_ablation(
        args.config, thresholds, args.seeds, args.overrides, args.data_root, args.output_dir
    )
    outcome = compare(ablation.table, args.workers)
    return _print_table(
        ablation.table,
        outcome,
        write_table(ablation.table, outcome, draw_ablation(ablation, outcome)) if outcome.results else "",
    )


def _print_table(table: Table, outcome: TableResult, text: str) -> int:
    """Print a table, its paths and the runs that failed; return the exit code."""
    from llava_keeplora.run_folder import REPORT, TABLE

    if text:
        sys.stdout.write(
            f"{text}\nfolder: {table.output_dir}\ntable: {table.output_dir / TABLE}\nHTML report: "
            f"{table.output_dir / REPORT}\n"
        )
        sys.stdout.flush()
    for failure in outcome.failures:
        sys.stderr.write(f"error: {failure}; mend it, and run the same command again\n")
    return 1 if outcome.failures else 0
