"""KeepLoRA without the driver: the memory of protected subspaces, for any model with linear layers."""

from llava_keeplora.adapters import freeze_A
from llava_keeplora.memory.keeplora import KeepLora

__all__ = ["KeepLora", "freeze_A"]
