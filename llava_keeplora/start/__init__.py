"""What is known of a run before its first stage.

Its tasks, its training arguments, and one check that a start and a plan share.
"""

from llava_keeplora.start.check import check_run
from llava_keeplora.start.tasks import Task, load_task, load_tasks

__all__ = ["Task", "check_run", "load_task", "load_tasks"]
