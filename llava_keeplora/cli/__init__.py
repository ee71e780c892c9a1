"""The command line `llava-keeplora`: a file for each group of commands.

A command imports heavy libraries when it runs, so that `--help` is quick.
"""

from llava_keeplora.cli.parser import build_parser, main, parse_arguments

__all__ = ["build_parser", "main", "parse_arguments"]
