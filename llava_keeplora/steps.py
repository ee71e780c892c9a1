"""The optimiser steps of a task, computed as `transformers.Trainer` does, and the examples that they see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def optimiser_steps(training: Mapping[str, Any], examples: int, world: int) -> int:
    """Return the number of optimiser steps of one task.

    Args:
        training: its `training` section, `num_train_epochs` included.
        examples: number of training examples.
        world: number of processes.
    """
    if int(training.get("max_steps", -1)) > 0:
        return int(training["max_steps"])
    batches = examples / (int(training.get("per_device_train_batch_size", 8)) * world)
    batches = math.floor(batches) if training.get("dataloader_drop_last") else math.ceil(batches)
    return math.ceil(
        training["num_train_epochs"]
        * math.ceil(batches / int(training.get("gradient_accumulation_steps", 1)))
    )


def step_size(training: Mapping[str, Any], world: int) -> int:
    """Return the number of examples of one optimiser step over all processes."""
    size = int(training.get("per_device_train_batch_size", 8))
    return size * int(training.get("gradient_accumulation_steps", 1)) * world


@dataclass(frozen=True)
class Budget:
    """What the training of a task takes.

    Args:
        examples: number of its training examples.
        batch: examples of one optimiser step over all processes.
        steps: number of optimiser steps.
        total: number of examples that all steps see together; None for passes over `examples`.
        dropped: number of `examples` that each pass leaves out, others each time (`dataloader_drop_last`).
    """

    examples: int
    batch: int
    steps: int
    total: int | None = None
    dropped: int = 0

    @classmethod
    def of(cls, training: Mapping[str, Any], examples: int, world: int) -> Budget:
        """Return the budget of a task that is trained on its own examples; arguments as `optimiser_steps`."""
        return cls.taken(training, examples, world, optimiser_steps(training, examples, world))

    @classmethod
    def taken(cls, training: Mapping[str, Any], examples: int, world: int, steps: int) -> Budget:
        """Return the budget of a training that took some steps; arguments as `optimiser_steps`."""
        batch = int(training.get("per_device_train_batch_size", 8)) * world
        dropped = examples % batch if training.get("dataloader_drop_last") else 0
        return cls(examples, step_size(training, world), steps, dropped=dropped)

    @property
    def per_pass(self) -> int:
        """Number of examples that a whole pass sees."""
        return self.examples - self.dropped

    @property
    def repeats(self) -> bool:
        """Whether the steps see some example more than once."""
        return self.seen > self.per_pass

    @property
    def seen(self) -> int:
        """Number of examples that the steps see, each counted as often as it is seen.

        The last step of a pass over the data has what is left of them.
        """
        if self.total is not None:
            return self.total
        passes, steps = divmod(self.steps, -(-self.per_pass // self.batch) or 1)
        return passes * self.per_pass + min(steps * self.batch, self.per_pass)
