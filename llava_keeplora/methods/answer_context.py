"""What a method gets to answer a task's examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from llava_keeplora.adapters import BaseWeights, Deltas
from llava_keeplora_eval.predictors import Predictor


@dataclass(frozen=True)
class AnswerContext:
    """Everything that a method can use to answer a task's examples, after some tasks.

    Args:
        task: name of the task whose examples are answered.
        learned: names of the tasks learned, in order.
        deltas: returns the deltas of these tasks, in order.
        model: the model, with what `Method.combine` adds to it.
        weights: the weights of every layer that the run changes; `apply` puts other deltas on them.
        recipe: the task's recipe.
        recipes: those of the tasks learned.
        asking: number of tokens → the model's own predictor of the examples, its answers of that length.
    """

    task: str
    learned: Sequence[str]
    deltas: Callable[[], list[Deltas]]
    model: nn.Module
    weights: BaseWeights
    recipe: Any = None
    recipes: Sequence[Any] = ()
    asking: Callable[[int], Predictor] | None = None
