"""The guard: whether a model got worse, beyond chance, at something that a user cares about.

(The environment of commands, `llava_keeplora_eval.guard`, is something else.)
"""

from llava_keeplora.guard.judge import NEW, OLD, WATCH, Limit, judge
from llava_keeplora.guard.text import headline, verdict_lines
from llava_keeplora.guard.verdicts import DONT_SHIP, exit_code, read_verdicts, run_record

__all__ = [
    "DONT_SHIP",
    "NEW",
    "OLD",
    "WATCH",
    "Limit",
    "exit_code",
    "headline",
    "judge",
    "read_verdicts",
    "run_record",
    "verdict_lines",
]
