"""Preparation of a run before its first stage: tasks, training arguments, and the check of all settings.

`train` and `plan` share the check.
"""

from llava_keeplora.start.check import check_run
from llava_keeplora.start.tasks import Task, load_task, load_tasks

__all__ = ["Task", "check_run", "load_task", "load_tasks"]
