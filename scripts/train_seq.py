"""Run a task sequence.

`deepspeed scripts/train_seq.py --config run.yaml [key=value ...]`, or with plain `python`.
"""

from __future__ import annotations

import argparse
import sys

from llava_keeplora.cli.parser import add_debug, run_command
from llava_keeplora.cli.train import add_train_arguments
from llava_keeplora_eval.guard import standard_streams


def main() -> int:
    """Run or resume a sequence, and return the exit code."""
    with standard_streams():
        parser = argparse.ArgumentParser(description=__doc__)
        add_train_arguments(parser)
        add_debug(parser)
        return run_command(parser)
    return 0  # `standard_streams` suppresses the error of a closed stdout.


if __name__ == "__main__":
    sys.exit(main())
