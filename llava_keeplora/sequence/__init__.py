"""The driver of a task sequence."""

from llava_keeplora.sequence.runner import run

__all__ = ["run"]
