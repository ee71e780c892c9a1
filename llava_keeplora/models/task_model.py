"""What every family's model on a task has.

The model inside, and how `transformers.Trainer` asks it to recompute activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import transformers  # its models, which take seconds to import, are looked up where they are used
from torch import Tensor, nn


class TaskModel(nn.Module):
    """The model on one task: `forward(**batch)` returns `loss`, the mean over the batch's weight.

    Args:
        model: plain or with adapters.
    """

    model: Any  # torch types the attributes of a module as Tensor | Module

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def constants(self) -> AbstractContextManager[Iterable[tuple[Tensor, Tensor]]]:
        """Hold what is the same in every batch as tensors that gradients are summed into.

        For instance the features of prompts.
        """
        raise NotImplementedError

    def weight(self, batch: Mapping[str, Tensor]) -> int:
        """Return how much a batch counts in the mean loss: its images, or its supervised tokens."""
        raise NotImplementedError

    def first(self, batch: Mapping[str, Tensor], count: int = 1) -> dict[str, Tensor]:
        """Return the first `count` examples of a batch, as a batch."""
        raise NotImplementedError

    def probe(self, batch: Mapping[str, Tensor]) -> None:
        """Run every adapted layer once on a batch, without a loss."""
        raise NotImplementedError

    def token_mask(self, part: str, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return which positions of a part's input are tokens and not padding; None where all are."""
        raise NotImplementedError

    def counting_examples(self) -> "TaskModel":
        """Return the model on the same task with a loss in which every example counts alike.

        Itself where every one does anyhow.
        """
        return self

    def at_every_position(self) -> "TaskModel":
        """Return the model with its prompts filled up to the last position, none of them masked.

        Itself without prompts.
        """
        return self

    @property
    def config(self):
        """The model's; `auto` sizes of a DeepSpeed configuration are worked out from it."""
        return self.model.config

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass; `transformers.Trainer` asks."""
        return bool(self.model.is_activation_checkpointing)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs
    ) -> None:
        """Recompute activations in the backward pass; `transformers.Trainer` calls this."""
        # The re-entrant form sends no gradient through a block whose input needs none, such as the first of a
        # frozen model.
        self.model.activation_checkpointing_enable(
            {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}, **kwargs
        )
        # That form alone needs embeddings that ask for a gradient; they would send the backward pass through
        # frozen encoders.
        self.model.disable_input_require_grads()

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.model.activation_checkpointing_disable()

    @contextmanager
    def recomputing(self, training: Mapping[str, Any]) -> Iterator[None]:
        """Recompute activations outside of training too, in the blocks where training does.

        Args:
            training: arguments for `transformers.TrainingArguments`.
        """
        if not recomputes(training):
            yield
            return
        self.activation_checkpointing_enable(
            training.get("activation_checkpointing_kwargs") or training.get("gradient_checkpointing_kwargs")
        )
        try:
            with blocks_recomputing(self):
                yield
        finally:
            self.activation_checkpointing_disable()


class MixedTask(TaskModel):
    """The model on several tasks, each with its own loss: a batch's key `task` says which.

    Args:
        tasks: task → the model on it; all have the same model inside.
    """

    #: A step's batches are weighted as they are made.
    accepts_loss_kwargs = False

    def __init__(self, tasks: Mapping[int, TaskModel]):
        super().__init__(next(iter(tasks.values())).model)
        # No ModuleList: the model inside would be found once more in every task.
        self.tasks = dict(tasks)

    def forward(self, task: int, **batch: Tensor) -> dict[str, Tensor]:
        """Return what the model on the task returns for a batch."""
        return self.tasks[task](**batch)


@contextmanager
def blocks_recomputing(model: nn.Module) -> Iterator[None]:
    """Let blocks whose activations are checkpointed recompute them in evaluation mode as well.

    Blocks recompute in training mode alone. What is inside them stays as it is, without dropout.
    """
    blocks = [
        module
        for module in model.modules()
        if isinstance(module, transformers.GradientCheckpointingLayer)
        and module.gradient_checkpointing
        and not module.training
    ]
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False


def recomputes(training: Mapping[str, Any]) -> bool:
    """Whether training recomputes activations in the backward pass; `transformers` has two names for it."""
    return bool(training.get("gradient_checkpointing") or training.get("activation_checkpointing"))
