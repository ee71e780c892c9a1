"""The examples of every optimiser step of a training on the data of several tasks.

Legend: n examples of all steps together, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_keeplora.steps import Budget


@dataclass(frozen=True)
class Mixture:
    """The examples of every step, in the order of the steps.

    Args:
        sources: (n,), int64: the task of each example, counted from 1; 0 for a method's general data.
        rows: (n,), int64: its position among that task's training examples, as the model takes them.
        sizes: (S,), int64: number of examples of each step.
    """

    sources: Tensor
    rows: Tensor
    sizes: Tensor


def draw_passes(examples: int, count: int, generator: torch.Generator, per_pass: int | None = None) -> Tensor:
    """Return `count` positions of `examples`, pass after pass over all of them, each in a new order.

    A pass ends after the first `per_pass` of its order, where they are given.
    """
    passes = -(-count // (per_pass or examples)) if count else 0
    orders = [torch.randperm(examples, generator=generator)[:per_pass] for _ in range(passes)]
    return torch.cat(orders)[:count] if orders else torch.empty(0, dtype=torch.long)


def own_sizes(budget: Budget) -> Tensor:
    """Return the number of examples of each step (S,) of a task that is trained on its own data.

    The last step of a pass over the data has what is left of them.
    """
    starts = torch.arange(budget.steps) % max(1, -(-budget.per_pass // budget.batch)) * budget.batch
    return torch.clamp(budget.per_pass - starts, max=budget.batch)


def draw_pool(pool: Sequence[tuple[int, int]], budget: Budget, seed: int) -> Mixture:
    """Return the examples of several tasks, pass after pass over all of them, each in a new order.

    Args:
        pool: (task, row) of every example.
        budget: what a training on all of them takes.
        seed: seed of the order.
    """
    sizes = own_sizes(budget)
    drawn = draw_passes(len(pool), int(sizes.sum()), torch.Generator().manual_seed(seed))
    examples = torch.tensor(pool, dtype=torch.long).reshape(-1, 2)[drawn]
    return Mixture(examples[:, 0], examples[:, 1], sizes)


def mix_tasks(budgets: Sequence[Budget], seed: int) -> Mixture:
    """Return the tasks' examples shuffled together, in as many steps as the tasks take one by one.

    Every task is seen as often as alone. Its examples are spread evenly over the training at random: the j-th
    of x comes at the time (j + u) / x, with u uniform in [0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [draw_passes(task.examples, task.seen, generator, task.per_pass) for task in budgets]
    times = [
        (torch.arange(len(drawn)) + torch.rand(len(drawn), generator=generator, dtype=torch.float64))
        / max(1, len(drawn))
        for drawn in rows
    ]
    order = torch.argsort(torch.cat(times), stable=True)
    sources = [torch.full_like(drawn, task) for task, drawn in enumerate(rows, start=1)]
    steps = sum(task.steps for task in budgets)
    ends = len(order) * torch.arange(steps + 1) // max(1, steps)
    return Mixture(torch.cat(sources)[order], torch.cat(rows)[order], ends.diff())


def add_examples(
    task: int, budget: Budget, added: Sequence[tuple[Sequence[tuple[int, int]], float]], seed: int
) -> Mixture:
    """Return a task's own examples, to each step of which others are added.

    Args:
        task: the task, counted from 1.
        budget: what its training takes alone; the number of steps stays.
        added: (pool of (source, row) as in `Mixture`, how many of it are added per example of the task). A
            pool is drawn pass after pass over all of it, each in a new order; the numbers are met over all
            steps together.
        seed: seed of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = own_sizes(budget)
    own = draw_passes(budget.examples, int(sizes.sum()), generator, budget.per_pass)
    # Per step, the task's own examples and then those of each pool.
    streams, per_step = [torch.stack([torch.full_like(own, task), own], dim=1)], [sizes]
    for pool, ratio in added:
        if not pool:
            continue
        met = torch.round(torch.cumsum(sizes, 0).double() * ratio).long()
        per_step.append(torch.diff(met, prepend=torch.zeros(1, dtype=torch.long)))
        drawn = draw_passes(len(pool), int(per_step[-1].sum()), generator)
        streams.append(torch.tensor(pool, dtype=torch.long).reshape(-1, 2)[drawn])
    steps = torch.cat([torch.repeat_interleave(torch.arange(len(sizes)), counts) for counts in per_step])
    order = torch.argsort(steps, stable=True)
    examples = torch.cat(streams)[order]
    return Mixture(examples[:, 0], examples[:, 1], torch.stack(per_step).sum(0))
