"""What the memory estimate needs to know of a method with protected subspaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llava_keeplora.methods.layer import Layer


@dataclass(frozen=True)
class SubspacePlan:
    """Description of what a method that protects subspaces computes, for the memory estimate.

    `llava-keeplora plan` estimates the memory of the stages from it, without data.

    Args:
        protects_weights: whether the subspaces hold principal directions of the weights.
        protects_features: whether they hold directions that finished tasks used.
        sketched: whether the first gradient pass sums sketches instead of whole gradients.
        may_sketch: whether it sums whole gradients but could use `gradient: sketch`.
        features_from_gradient: whether a task's directions are taken from a gradient pass.
        every_position: whether the feature pass takes the prompts at every position of the text encoder.
        statistics: (groups of layers, bases, bytes, seed) → layer name → statistic of its features.
        first_gradient: whether a gradient pass comes before every task.
        kept_bytes: (layers by name, number of finished tasks) → bytes that are kept besides the subspaces.
    """

    protects_weights: bool
    protects_features: bool
    sketched: bool
    may_sketch: bool
    features_from_gradient: bool
    every_position: bool
    statistics: Callable[[list[list[Layer]], Mapping[str, Tensor], int, int], Mapping[str, Any]]
    first_gradient: bool = True
    kept_bytes: Callable[[Mapping[str, Layer], int], int] = lambda layers, tasks: 0
