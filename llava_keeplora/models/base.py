"""What a model family offers the driver: everything about the model, nothing about methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from llava_keeplora.config import EvaluationConfig, ModelConfig
from llava_keeplora.models.usage import Usage
from llava_keeplora.models.workload import Work
from llava_keeplora_eval.predictors import Predictor
from llava_keeplora_recipes import Example, Recipe, TaskData


class Images(Protocol):
    """What the model takes for the images of a split's examples, kept where it fits; the driver's cache."""

    def take(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return what the model takes for the images of some examples."""

    def of(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Return the same by example."""


@dataclass(frozen=True)
class Prepared:
    """A split's images made as they are asked for, kept nowhere; see `Images`.

    Args:
        family: makes them.
        data: the split; None where images are asked for by example alone.
    """

    family: Family
    data: TaskData | None = None

    def take(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return what the model takes for the images of some examples."""
        return self.of([self.data[i] for i in indices])

    def of(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Return the same by example."""
        return self.family.prepare(examples)


class Inputs(Protocol):
    """One split of a task as the model trains on it, by index.

    Attributes:
        weights: how much each example counts in the mean loss: 1, or its number of supervised tokens.
        rows: each example's row in the split; several have one where an image is learned with several
            captions.
    """

    weights: Sequence[int]
    rows: Sequence[int]

    def __len__(self) -> int: ...
    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return some examples as a batch."""


class Crops(Protocol):
    """A split's images, cropped at random for each step of training."""

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return some examples as a batch without images."""

    def filled(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return a batch of `collate` with the images as an optimiser step, counted from 0, sees them."""


class Family(Protocol):
    """A model with its processor.

    It is opened without its weights, so that data are checked before they are loaded.

    Attributes:
        name: as methods name it.
        path, revision: the folder or Hub id that it is loaded from.
        kinds: of tasks that it can learn.
        parts: part → dotted prefix of its layers.
        targets: part → leaf names of the linear layers that are adapted unless a configuration says
            otherwise.
        model: the model, after `load`; after `skeleton` one without weights.
        quantization: the form of the frozen base's linear layers, or None.
        skip_quantization: dotted prefixes of what stays unquantised all the same.
        auto_class: name of the class of transformers that loads the model.
        eval_cost: of answering one example, in forward passes over it, for the estimate of time.
        unsupported: setting that the model can't follow → what it does. Of `random_resized_crop` and
            `test_prompts`, see `MethodConfig`, and `every_position` and `keeps_features`, see `Method`.
    """

    name: str
    path: str
    revision: str | None
    kinds: tuple[str, ...]
    parts: Mapping[str, str]
    targets: Mapping[str, tuple[str, ...]]
    model: nn.Module
    quantization: str | None
    skip_quantization: tuple[str, ...]
    auto_class: str
    eval_cost: float
    unsupported: Mapping[str, str]

    @classmethod
    def from_config(cls, path: str, model: ModelConfig, evaluation: EvaluationConfig) -> Family:
        """Open the model that a configuration names, without its weights."""

    def load(self, dtype: torch.dtype) -> None:
        """Load the weights."""

    def skeleton(self, dtype: torch.dtype) -> None:
        """Build the model without weights, on the meta device."""

    def linear_layers(self, part: str, targets: Sequence[str]) -> dict[str, nn.Linear]:
        """Return the linear layers of a part by full name."""

    def layers_without_gradient(self, part: str, targets: Sequence[str]) -> list[str]:
        """Return the layers of a part that the loss cannot reach."""

    def prepare(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Return what the model takes for the examples' images."""

    def inputs(self, data: TaskData, images: Images) -> Inputs:
        """Return a split as the model trains on it."""

    def crops(self, data: TaskData, scale: tuple[float, float], seed: int) -> Crops:
        """Return a split as random crops for training, see `MethodConfig.random_resized_crop`.

        Only called if `unsupported` does not have `random_resized_crop`.
        """

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the text encoder's inputs for texts, each (texts, tokens); refuse texts that are too long.

        Only called if `unsupported` does not have `test_prompts`.
        """

    def check(self, data: TaskData) -> None:
        """Refuse a split that the model cannot learn from."""

    def task(self, recipe: Recipe) -> nn.Module:
        """Return the model on a task, a `TaskModel`."""

    def predictor(self, recipe: Recipe, images: Images, tokens: int | None = None) -> Predictor:
        """Return what answers a task's examples."""

    def usage(self, data: TaskData) -> Usage:
        """Return how plain transformers load and ask the model, with an example from a split."""

    def workload(self, recipe: Recipe, train: TaskData | None, test: TaskData | None) -> Work:
        """Return what a task asks of the machine, with the model without weights.

        A plan asks for it; a family without it, `workload_task` and `answer` is run without a plan.

        Args:
            recipe: the task's.
            train, test: its splits; None where the data are not there.
        """

    def workload_task(self, work: Work) -> nn.Module:
        """Return the model on a task of which only what it asks of the machine is known."""

    def answer(self, work: Work, size: int) -> None:
        """Answer `size` copies of a task's longest question as its predictor does, to measure memory."""
