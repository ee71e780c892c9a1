"""Commands that inspect runs and the installation: `plan`, `report`, `doctor`, `list`."""

from __future__ import annotations

import argparse
import sys

from llava_keeplora.cli.arguments import add_command, add_methods, add_run_arguments
from llava_keeplora.cli.run_sequence import load_run_config, without_collection


def add_plan(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `plan` and return its parser."""
    parser = add_command(
        commands, "plan", "estimate a run's memory, disk space and steps, and whether it fits", run_plan
    )
    add_run_arguments(parser)
    add_methods(parser)
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="number of GPUs to plan for, a process each (default: the CPU of this machine)",
    )
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="memory of each GPU (default: that of this machine's)"
    )
    parser.add_argument("--json", action="store_true", help="write the plan as JSON, in bytes")
    return parser


def add_report(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `report` and return its parser."""
    parser = add_command(
        commands,
        "report",
        "write the tables, plots and HTML page of a run, or of several side by side",
        run_report,
    )
    parser.add_argument("run_folders", metavar="RUN", nargs="+", help="one run folder, or several")
    parser.add_argument(
        "--into", metavar="DIR", help="the folder to write to (default: the run's own; several runs need one)"
    )
    return parser


def add_doctor(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `doctor` and return its parser."""
    parser = add_command(commands, "doctor", "examine the machine, or every file of a run", run_doctor)
    parser.add_argument("run_folder", nargs="?", metavar="RUN", help="a run folder (default: the machine)")
    return parser


def add_list(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `list` and return its parser."""
    return add_command(
        commands, "list", "list methods, tasks, sequences, configurations and models", run_list
    )


def run_plan(args: argparse.Namespace) -> None:
    """Print the plan of a run.

    Raises:
        ConfigError: the run does not fit.
    """
    import dataclasses
    import json

    config = load_run_config(args)
    with without_collection():
        from llava_keeplora.errors import ConfigError
        from llava_keeplora.plan import describe, make_plan, refusal

    plan = make_plan(config, args.gpus, args.gpu_memory)
    sys.stdout.write(
        json.dumps(dataclasses.asdict(plan) | {"fits": plan.fits}, indent=1) + "\n"
        if args.json
        else describe(plan)
    )
    sys.stdout.flush()
    problem = refusal(plan)
    if problem is not None:
        raise ConfigError(*problem)


def run_report(args: argparse.Namespace) -> None:
    """Write the report of runs and print its summary."""
    with without_collection():
        from llava_keeplora.report.run_report import write_run_report
        from llava_keeplora.report.terminal import summary

    results = write_run_report(*args.run_folders, into=args.into)
    sys.stdout.write(summary(args.into or args.run_folders[0], results))


def run_doctor(args: argparse.Namespace) -> None:
    """Print a line for each check of a run or of the machine.

    Raises:
        RunError: a check has failed.
    """
    with without_collection():
        from llava_keeplora.doctor import examine_machine, examine_run
        from llava_keeplora.errors import RunError, UserError

    problems = 0
    for check in examine_run(args.run_folder) if args.run_folder else examine_machine():
        problems += isinstance(check, UserError)
        sys.stdout.write(f"{'wrong' if isinstance(check, UserError) else 'ok'}\t{check}\n")
    if problems:
        raise RunError(
            f"{args.run_folder or 'this machine'} has {problems} thing{'s' * (problems > 1)} to repair",
            "each line with 'wrong' names its cure",
        )


def run_list(args: argparse.Namespace) -> None:
    """Print the names of methods, tasks, sequences, configurations and models."""
    with without_collection():
        from llava_keeplora.config import list_configs, list_tables
        from llava_keeplora.methods import METHODS
        from llava_keeplora_eval.models import EMBEDDED
        from llava_keeplora_recipes import list_recipes, list_sequences

    lines = ["methods"]
    lines += [
        f"  {name:12} {m.info.title} {m.info.url}\n  {'':12} {m.info.needs}" for name, m in METHODS.items()
    ]
    listed = {
        "tasks": list_recipes(),
        "sequences": list_sequences(),
        "configurations": list_configs(),
        "tables": list_tables(),
        "embedded models": EMBEDDED,
    }
    for title, names in listed.items():
        lines += [title, *(f"  {name}" for name in names)]
    sys.stdout.write("\n".join(lines) + "\n")
