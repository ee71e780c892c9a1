"""The parser of `llava-keeplora`, and the functions that turn a command line into an exit code."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava_keeplora.cli import analyze, guard, inspection, share, tables, train
from llava_keeplora_eval.guard import check_words, guarded, standard_streams

#: Functions that each add one command and return its parser, in the order of `--help`.
COMMANDS = (
    train.add_train,
    tables.add_reproduce,
    tables.add_compare,
    tables.add_ablate,
    inspection.add_plan,
    train.add_extend,
    train.add_adopt,
    train.add_start_adapter,
    train.add_fork,
    guard.add_guard,
    inspection.add_report,
    share.add_export,
    share.add_import,
    analyze.add_analyze,
    inspection.add_doctor,
    inspection.add_list,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        argv: the words after the program's name; those of this process when None.

    Returns:
        0; 1 if runs of a table failed; 2 for an error that the user can repair; 3 after a task that broke a
        limit of the run's guard; 130 after Ctrl-C, 143 after
        SIGTERM.
    """
    with standard_streams():
        return run_command(build_parser(), argv)
    return 0  # `standard_streams` suppresses the error of a closed stdout.


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parse a command line, run the command that it names, and return the exit code."""
    args = parse_arguments(parser, argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    going_on = (
        "every finished stage is kept, run the same command to go on"
        if args.resumes
        else "run the same command again"
    )
    return guarded(lambda: args.run(args), debug=args.debug, going_on=going_on)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `llava-keeplora`."""
    parser = argparse.ArgumentParser(
        prog="llava-keeplora",
        description="train a sequence of tasks, plan and compare runs, report on them, export their results.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add_command in COMMANDS:
        add_debug(add_command(commands), ", and more of what is done")
    return parser


def add_debug(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add the argument `--debug`, which every command has."""
    parser.add_argument("--debug", action="store_true", help=f"show the traceback of an error{more}")


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; overrides may come before, between and after the options."""
    args, rest = parser.parse_known_args(check_words(parser, argv))
    unknown = rest if not hasattr(args, "overrides") else [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args
