"""All tasks learned at once: the usual bound of what is left of every task at the end of a sequence.

Source: multitask learning (Caruana 1997, https://doi.org/10.1023/A:1007379606734), the last row of most
tables of continual learning.

One LoRA adapter is trained on the training data of all tasks, shuffled together, from the untouched base, in
as many optimiser steps as the tasks take one by one. Every example is seen as often as it is alone, so that
the row trains on exactly as many examples as sequential LoRA over the whole sequence. The loss of a step is
the mean over all its examples (over their answers' tokens, for models that write answers), each with the
class prompts and the prompt of its own task. All tasks are scored once.

The training takes the place of the last task's; the tasks before it train nothing. A run that is extended
trains on all its tasks again. The run stores no examples: the data of all tasks must be there at once, which
a method that learns task by task does not need.

Differences from tables of other papers: a step's examples of one task are a batch of their own, because class
prompts belong to a task; they are weighted as in one batch. Where the learning rate is listed by task, that
of the last task is used.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava_keeplora.adapters import AdapterInit, Deltas
from llava_keeplora.methods.base import MethodInfo, TaskContext
from llava_keeplora.methods.mixture import Mixture, mix_tasks
from llava_keeplora.methods.seq_lora import SequentialLora
from llava_keeplora.steps import Budget


class Joint(SequentialLora):
    """Training on all tasks at once as `methods/joint.py` describes it."""

    info = MethodInfo(
        "joint",
        "Multitask Learning",
        "https://doi.org/10.1023/A:1007379606734",
        kept="nothing (the training data of all tasks are read where they are, all at once)",
    )
    cumulative = False
    mixes = True
    bound = True
    adopts = False

    def budget(self, index: int, budgets: Sequence[Budget]) -> Budget:
        """Return the sum of all tasks for the last one, and nothing for the others."""
        last = index == len(budgets)
        return Budget(
            sum(task.examples for task in budgets) if last else 0,
            max(task.batch for task in budgets),
            sum(task.steps for task in budgets) if last else 0,
            sum(task.seen for task in budgets) if last else 0,
        )

    def init_adapters(self, ctx: TaskContext) -> dict[str, AdapterInit]:
        """Return a new adapter for every layer with the last task, and none before."""
        return super().init_adapters(ctx) if ctx.index == ctx.tasks else {}

    def mixture(self, ctx: TaskContext) -> Mixture:
        """Return all tasks' examples shuffled together."""
        return mix_tasks(ctx.budgets, ctx.seed)

    def combine(self, deltas: Sequence[Deltas]) -> list[Deltas]:
        """Return the update of the training on all tasks."""
        return list(deltas[-1:])

    def scored(self, index: int, tasks: int) -> Sequence[int]:
        """Return all tasks after the last one, and none before."""
        return range(1, tasks + 1) if index == tasks else ()
