"""Checks that third parties can run on their methods, model families, metrics and readers.

They are used like scikit-learn's `check_estimator`: each raises an AssertionError with a sentence that names
the rule that is broken. Nothing is downloaded.
"""

from llava_keeplora.testing.families import FAMILY_CHECKS, check_family
from llava_keeplora.testing.methods import METHOD_CHECKS, check_method
from llava_keeplora.testing.small import small_run, write_small_clip, write_small_tasks
from llava_keeplora_eval.testing import check_metric
from llava_keeplora_recipes.testing import check_reader

__all__ = [
    "FAMILY_CHECKS",
    "METHOD_CHECKS",
    "check_family",
    "check_method",
    "check_metric",
    "check_reader",
    "small_run",
    "write_small_clip",
    "write_small_tasks",
]
