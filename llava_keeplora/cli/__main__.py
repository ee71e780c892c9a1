"""Entry point of `python -m llava_keeplora.cli`."""

import sys

from llava_keeplora.cli import main

if __name__ == "__main__":
    sys.exit(main())
