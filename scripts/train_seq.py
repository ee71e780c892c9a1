"""Run a task sequence.

`deepspeed scripts/train_seq.py --config run.yaml [key=value ...]`, or with plain `python`.
"""

from __future__ import annotations

import argparse
import sys

from llava_keeplora.cli import add_train_arguments, going_on, parse_arguments
from llava_keeplora_eval.guard import guarded, standard_streams


def main() -> int:
    """Run, or go on with, a sequence; returns the exit code."""
    with standard_streams():
        parser = argparse.ArgumentParser(description=__doc__)
        add_train_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        args = parse_arguments(parser)
        return guarded(lambda: args.run(args), debug=args.debug, going_on=going_on(args))
    return 0  # Nobody reads what is left to say.


if __name__ == "__main__":
    sys.exit(main())
