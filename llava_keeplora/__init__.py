"""Teach a vision-language model task after task without forgetting, with KeepLoRA adapters."""

__version__ = "0.1.0"
