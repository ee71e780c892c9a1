"""Checks of the contract that methods, families, metrics and readers keep, for third parties.

They are used as scikit-learn's `check_estimator` is: each raises an AssertionError that says in a sentence
what is wrong. Nothing is downloaded.
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
