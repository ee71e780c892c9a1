"""Import bitsandbytes without loading torch's compiler.

transformers and PEFT import bitsandbytes wherever it is installed. Its import passes four operators, which
only devices without kernels of their own call, to `torch.compile`; that loads the compiler, whether or not
anything is quantised, and would compile them anew for every shape. TORCHDYNAMO_DISABLE does not prevent it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def import_bitsandbytes() -> None:
    """Import bitsandbytes, its operators left as they are; what is compiled later is compiled."""
    import torch

    compiling: Any = torch.compile
    torch.compile = _leave_eager  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiling


def _leave_eager(model: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    """Return a function as it is, in place of `torch.compile`."""
    return model
