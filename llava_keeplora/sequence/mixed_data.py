"""The batches of a training on the data of several tasks: each of one task, weighted as in one batch.

An optimiser step is cut into batches of one task each, of at most `size` examples, which are dealt to the
processes. The weights make their sum the mean over all examples of the step, so that a step is the same for
any number of processes and any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llava_keeplora.methods import Mixture
from llava_keeplora.models import Crops, Inputs

#: Keys of a DeepSpeed configuration that say how many examples a step has.
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
#: Keys of a batch: its task, and the factor on its loss.
TASK, SHARE = "task", "share"


class MixedData:
    """The batches of all steps, in order, as a data set with one batch per item.

    Args:
        mixture: the examples of each step.
        inputs: task → its training data as the model takes them.
        crops: task → its images as random crops; empty where images are not cropped.
        size: most examples of a batch.
        world: number of processes.
    """

    def __init__(
        self,
        mixture: Mixture,
        inputs: Mapping[int, Inputs],
        crops: Mapping[int, Crops],
        size: int,
        world: int,
    ):
        self.mixture, self.inputs, self.crops = mixture, inputs, crops
        self.size, self.world = size, world
        self._ends = mixture.sizes.cumsum(0)
        most = max((len(self.pieces(step)) for step in range(len(mixture.sizes))), default=0)
        #: Batches of a step in each process.
        self.accumulation = max(1, -(-most // world))

    def __len__(self) -> int:
        return len(self.mixture.sizes) * self.accumulation * self.world

    def __getitem__(self, index: int) -> int:
        return index

    def arguments(self, training: Mapping[str, Any]) -> dict[str, Any]:
        """Return a task's `training` section with which `Trainer` takes the batches as they are."""
        deepspeed = training.get("deepspeed")
        # Its numbers of examples are those of a step on one task.
        auto = {key: "auto" for key in BATCH_KEYS if isinstance(deepspeed, Mapping) and key in deepspeed}
        return {
            **training,
            **({"deepspeed": {**deepspeed, **auto}} if auto else {}),
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": self.accumulation,
            "num_train_epochs": 1,
            "max_steps": -1,
            "dataloader_drop_last": False,
            "train_sampling_strategy": "sequential",
        }

    def pieces(self, step: int) -> list[tuple[int, list[int]]]:
        """Return the batches of a step as (task, rows)."""
        end = int(self._ends[step])
        part = slice(end - int(self.mixture.sizes[step]), end)
        by_task: dict[int, list[int]] = {}
        sources, rows = self.mixture.sources[part].tolist(), self.mixture.rows[part].tolist()
        for source, row in zip(sources, rows, strict=True):
            by_task.setdefault(source, []).append(row)
        return [
            (task, by_task[task][start : start + self.size])
            for task in sorted(by_task)
            for start in range(0, len(by_task[task]), self.size)
        ]

    def collate(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return a batch with its `TASK` and `SHARE`.

        Where a step has fewer batches than the processes take, one of its examples fills up: its share is 0.
        """
        step, number = divmod(indices[0], self.accumulation * self.world)
        pieces = self.pieces(step)
        share = 0.0
        if number < len(pieces):
            task, rows = pieces[number]
            share = self._weight(task, rows) / sum(self._weight(*piece) for piece in pieces)
        else:
            task, rows = pieces[0][0], pieces[0][1][:1]
        # The Trainer takes the mean over the batches, and the processes' gradients are averaged.
        share *= self.accumulation * self.world
        taken = (self.crops or self.inputs)[task].collate(rows)
        return {**taken, TASK: task, SHARE: share}

    def _weight(self, task: int, rows: Sequence[int]) -> int:
        return sum(self.inputs[task].weights[row] for row in rows)

    def filled(self, batch: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Return a batch with the crops that a step sees; see `Crops`."""
        others: dict[str, Tensor] = {key: value for key, value in batch.items() if key != TASK}
        return {**self.crops[batch[TASK]].filled(others, step), TASK: batch[TASK]}
