"""Import bitsandbytes without loading torch's compiler.

transformers and PEFT import bitsandbytes wherever it is installed. Its import passes four operators, which
only devices without kernels of their own call, to `torch.compile`; that loads the compiler, which takes as
long as a fifth of a start, whether or not anything is quantised, and would compile them anew for every shape.
"""

from __future__ import annotations

import os

SWITCH = "TORCHDYNAMO_DISABLE"


def import_bitsandbytes() -> None:
    """Import bitsandbytes with the compiler switched off; nothing else that is compiled changes."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        import bitsandbytes  # noqa: F401
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
