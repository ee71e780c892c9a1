"""What all methods of a run share: data, model, processes, caches and progress."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llava_keeplora.adapters import BaseWeights
from llava_keeplora.adopt import Source, Update, find_source, read_update
from llava_keeplora.config import RunConfig, deepspeed_config, make_method
from llava_keeplora.deepspeed_zero import Zero
from llava_keeplora.distributed import get_rank, get_world_size, has_group
from llava_keeplora.journal import Journal, rolled_back
from llava_keeplora.methods import Reference
from llava_keeplora.models import DTYPES, MODEL_FAMILIES, Family, Inputs, load_model
from llava_keeplora.objects import Objects
from llava_keeplora.run_folder import JOURNAL, Stage
from llava_keeplora.sequence.base_cache import BaseCache
from llava_keeplora.sequence.data import ImageCache
from llava_keeplora.sequence.progress import Progress
from llava_keeplora.sequence.workspace import Workspace
from llava_keeplora.start import Task
from llava_keeplora.start.reference_data import GeneralData, read_general, read_reference
from llava_keeplora.start.watched import load_watched
from llava_keeplora.versions import installed_versions


class RunContext:
    """Data, model, processes, caches and progress of a run.

    Args:
        config: the run's configuration.
        workspace: the run's folder.
        tasks: the sequence.
        family: the model, its weights not loaded yet; `load` does that after every example has been checked.
        objects: what the calling program gives instead of files.
    """

    def __init__(
        self,
        config: RunConfig,
        workspace: Workspace,
        tasks: list[Task],
        family: Family,
        objects: Objects = Objects(),
    ):
        self.config, self.workspace, self.tasks, self.family = config, workspace, tasks, family
        self.objects = objects
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = dataclasses.asdict(config.model)
        # Without `family` if it is not set, so that cache entries of earlier versions still match.
        model |= {"family": MODEL_FAMILIES.source_hash(model["family"])} if model["family"] else {}
        model = {
            key: value for key, value in model.items() if key not in ("family", "parts", "object") or value
        }
        common = {"model": model, "versions": installed_versions(), "device": self.device.type}
        common |= {"base": workspace.base} if config.base_cache else {}
        self.base_cache = BaseCache(config.base_cache, common)
        self.cache = ImageCache(family.prepare, config.data.cache_gb, self.base_cache)
        self.inputs: list[Inputs] = [
            family.inputs(task.train, self.cache.split(task.train)) for task in tasks
        ]
        #: The recipes that the guard watches.
        self.watched = load_watched(config, tasks, objects)
        for data in (
            *(task.test for task in (*tasks, *self.watched)),
            *(task.held_out for task in tasks if task.held_out),
        ):
            family.check(data)
        self.references: dict[str, Reference] = {}
        self.general: dict[str, GeneralData] = {}
        for label, method in config.methods.items():
            made = make_method(method)
            general, spec = made.general_data_spec(), made.reference_data_spec()
            # These data may be large, and a finished method doesn't need them.
            if general and not self.finished(label):
                self.general[label] = read_general(label, general, config.data, family, self.cache.split)
            if spec and not self.finished(label):
                recipe, file = spec
                self.references[label] = read_reference(
                    label, recipe, file, config.data, family, self.cache.split
                )
        self.zero = Zero(deepspeed_config(config))
        self.distributed = has_group()
        self.rank, self.world = get_rank(), get_world_size()
        self._updates: dict[int, Update] = {}
        # Set by the runner when the layers and the open stages of every method are known.
        self.base: BaseWeights
        self.progress: Progress

    def finished(self, label: str) -> bool:
        """Return whether a method of the run has learned every task."""
        entries = Journal(self.workspace.label(label) / JOURNAL).entries
        last = len(self.tasks) - len(rolled_back(entries))
        return any((entry.task, entry.stage) == (last, Stage.CLOSED) for entry in entries)

    def load(self) -> None:
        """Load the model's weights; with ZeRO-3, shard them over the processes."""
        self.family.load(DTYPES[self.config.model.dtype])
        self.zero.adopt(self.family.model)
        if not self.family.quantization:  # Quantised weights were loaded onto their device.
            self.family.model.to(self.device)

    def pretrained(self) -> nn.Module:
        """Load the model a second time, frozen and without any change that a method made."""
        if self.objects.given is not None:
            return self.base.copy_of(self.family.model)
        return load_model(self.config.model).model.to(self.device)

    def find_source(self, index: int) -> Source:
        """Find what a task's update is adopted from."""
        return find_source(str(self.config.source(index)))

    def update(self, index: int) -> Update:
        """Return the update that a task adopts; it is read once for all methods, on the untouched model."""
        if index not in self._updates:
            model = self.config.model
            as_in_files = model.object or (model.dtype == "float32" and not model.quantization)
            loaded = self.family.model if as_in_files and not self.zero.partitions else None
            self._updates[index] = read_update(
                self.find_source(index), model, self.workspace.base, self.family, loaded
            )
        return self._updates[index]

    def once(self, what: Mapping[str, Any], files: Mapping[str, Path], make: Callable[[], object]) -> float:
        """Copy files that depend on the untouched model from the base cache, or make and store them.

        Args:
            what: everything that the files depend on, except the model.
            files: name in the cache → path of the file; `make` need not write all of them.
            make: writes the files; called in every process.

        Returns:
            how long another run took to make the files, in seconds; 0 if they were made now.
        """
        cached = self.base_cache.take(what, files) if self.rank == 0 else None
        seconds = self.first_of(cached or 0.0)
        if seconds:
            return seconds
        begun, start = any(path.exists() for path in files.values()), time.perf_counter()
        make()
        # Files that a killed attempt had begun took longer than this attempt: their time is not known.
        if self.rank == 0 and not begun:
            self.base_cache.put(what, files, time.perf_counter() - start)
        return 0.0

    def most(self, count: int) -> int:
        """Return the largest of the processes' counts."""
        if not self.distributed:
            return count
        largest = torch.tensor(count, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def first_of(self, value: float) -> float:
        """Return the main process's value."""
        if not self.distributed:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.distributed:
            dist.barrier()
