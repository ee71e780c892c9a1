"""The number of optimiser steps of a task, computed as `transformers.Trainer` does."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
