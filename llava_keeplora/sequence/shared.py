"""What all methods of a run have in common."""

from __future__ import annotations

import torch
import torch.distributed as dist

from llava_keeplora.adapters import BaseWeights
from llava_keeplora.config import RunConfig
from llava_keeplora.models import DTYPES, Family, Inputs
from llava_keeplora.sequence.data import ImageCache, Task
from llava_keeplora.sequence.progress import Progress
from llava_keeplora.sequence.workspace import Workspace


class Shared:
    """Data, model, processes, progress.

    Args:
        config: the run.
        workspace: its folder.
        tasks: the sequence.
        family: the model, its weights not loaded yet: they come after every example has been checked.
    """

    def __init__(self, config: RunConfig, workspace: Workspace, tasks: list[Task], family: Family):
        self.config, self.workspace, self.tasks, self.family = config, workspace, tasks, family
        self.cache = ImageCache(family.prepare, config.data.cache_gb)
        self.inputs: list[Inputs] = [family.inputs(task.train, self.cache.split(task.train)) for task in tasks]
        for task in tasks:
            family.check(task.test)
        family.load(DTYPES[config.model.dtype])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        family.model.to(self.device)
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world = dist.get_world_size() if self.distributed else 1
        # Set by the runner once every method has named its layers and its open stages.
        self.base: BaseWeights
        self.progress: Progress

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.distributed:
            dist.barrier()
