"""Teach a vision-language model task after task without forgetting, with KeepLoRA adapters."""

import importlib

__version__ = "0.1.0"

#: Public name → its module, imported when the name is first used, so that `import llava_keeplora` is quick.
_MODULES = {
    "KeepLora": "memory",
    "MatrixCallback": "memory.matrix_callback",
    "Run": "run",
    "freeze_A": "memory",
    "load_config": "config",
}

__all__ = [
    "KeepLora",
    "MatrixCallback",
    "Run",
    "freeze_A",
    "load_config",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
