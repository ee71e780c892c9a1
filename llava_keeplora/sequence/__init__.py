"""The driver: runs every method over the sequence of tasks, and resumes a run that was interrupted."""

from llava_keeplora.sequence.runner import run

__all__ = ["run"]
