"""Every task learned alone from the untouched base: the bound of what a method can learn of each task.

Source: the row of the same name in MCITlib (Guo et al. 2025, arXiv 2508.07307).

Task t trains a new LoRA adapter on the base, as sequential LoRA trains its first one, and only task t is
scored with it. So the row has one score per task, and no forgetting. The first task's update is that of
sequential LoRA, number for number; every task's is that of `merge` with the rule `mean`.

Differences from MCITlib: those of `methods/seq_lora.py`, whose settings it has.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava_keeplora.adapters import Deltas
from llava_keeplora.methods.base import MethodInfo
from llava_keeplora.methods.seq_lora import SequentialLora


class Individual(SequentialLora):
    """Training of every task alone as `methods/individual.py` describes it."""

    info = MethodInfo(
        "individual",
        "MCITlib: Multimodal Continual Instruction Tuning Library and Benchmark (its row Individual)",
        "https://arxiv.org/abs/2508.07307",
        task_id_at_test=True,
        extra_parameters="an adapter per task",
        mergeable=False,
    )
    cumulative = False
    separate_tasks = True
    bound = True
    adopts = False

    def combine(self, deltas: Sequence[Deltas]) -> list[Deltas]:
        """Return the last task's update alone."""
        return list(deltas[-1:])

    def scored(self, index: int, tasks: int) -> list[int]:
        """Return the task that was just learned."""
        return [index]
