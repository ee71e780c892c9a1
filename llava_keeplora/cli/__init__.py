"""The command line `llava-keeplora`: a file for each group of commands.

Commands import heavy libraries only when they run, so that `--help` is quick.
"""

from llava_keeplora.cli.parser import build_parser, main, parse_arguments

__all__ = ["build_parser", "main", "parse_arguments"]
