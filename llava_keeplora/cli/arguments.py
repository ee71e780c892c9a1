"""Arguments that several commands share, and parsers of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def add_methods(parser: argparse.ArgumentParser) -> None:
    """Add the argument that selects some of a configuration's methods."""
    parser.add_argument(
        "--methods",
        type=labels,
        metavar="LABEL,...",
        help="run only these of the configuration's methods (default: all)",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a configuration and change it."""
    parser.add_argument("--config", required=True, help="a YAML file, or the name of a shipped configuration")
    add_settings(parser)


def add_settings(
    parser: argparse.ArgumentParser,
    overrides: str = "dotted overrides, for instance training.learning_rate=5e-4",
) -> None:
    """Add the arguments that change a configuration.

    Args:
        parser: the command's.
        overrides: help of the overrides.
    """
    parser.add_argument("--data-root", help="the folder with the data sets (data.root)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help=overrides,
    )


def add_command(
    commands: argparse._SubParsersAction, name: str, summary: str, run: Callable, resumes: bool = False
) -> argparse.ArgumentParser:
    """Add a command and return its parser.

    Args:
        commands: the program's commands.
        name: the command's name.
        summary: one line for `--help`.
        run: function of the parsed arguments that executes the command; it may return an exit code.
        resumes: whether repeating the command resumes one that was stopped.
    """
    parser = commands.add_parser(name, help=summary)
    parser.set_defaults(run=run, resumes=resumes)
    return parser


def words(text: str) -> list[str]:
    """Split a comma-separated list into its words."""
    return [word for word in text.split(",") if word]


def labels(text: str) -> list[str]:
    """Split a comma-separated list of labels.

    Raises:
        ArgumentTypeError: the list is empty.
    """
    if not words(text):
        raise argparse.ArgumentTypeError(f"'{text}' names no method; give labels, such as seq-lora,keeplora")
    return words(text)


def numbers(text: str) -> list[float]:
    """Parse a comma-separated list of numbers."""
    return _convert(float, text, "numbers; give some like 0.5,0.8")


def whole_numbers(text: str) -> list[int]:
    """Parse a comma-separated list of integers."""
    return _convert(int, text, "whole numbers; give some like 0,1,2")


def _convert(to_number: Callable[[str], T], text: str, what: str) -> list[T]:
    try:
        return [to_number(word) for word in words(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of {what}") from None


def process_count(text: str) -> int:
    """Parse a number of processes, at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of processes; give 1 or more")
    return int(text)
