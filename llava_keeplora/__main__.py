"""Run `python -m llava_keeplora` like the command `llava-keeplora`."""

import sys

from llava_keeplora.cli import main

if __name__ == "__main__":
    sys.exit(main())
