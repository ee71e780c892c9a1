"""How many feature directions a task may add, if the parts' ε_f is `auto`.

Legend: in features of a layer, k protected dimensions, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from llava_keeplora.methods.base import Layer, TaskContext
from llava_keeplora.run_folder import CAPACITY, Capacity

BUDGET = "feature_budget"


def feature_budgets(layers: Mapping[str, Layer], bases: Mapping[str, Tensor], tasks: int) -> dict[str, int]:
    """Return the budget of every layer whose ε_f is `auto`.

    Every task but the last gets an equal budget, so that r directions are left for the last one.

    Args:
        layers: the adapted layers.
        bases: layer name → (in, k) before the first task.
        tasks: number of tasks of the run.
    """
    return {
        name: (layer.module.in_features - bases[name].shape[1] - layer.rank) // max(1, tasks - 1)
        for name, layer in layers.items()
        if "energy_feature" in layer.auto
    }


def budget_left(ctx: TaskContext, name: str, protected: int) -> int | None:
    """Return how many directions a task may add to a layer at most; None for no limit.

    That is the task's budget and what earlier tasks left of theirs.

    Args:
        ctx: the task's context.
        name: the layer's name.
        protected: k.
    """
    if name not in ctx.base.get(BUDGET, {}):
        return None
    allowed = Capacity.from_dict(ctx.base[CAPACITY][name]).protected + ctx.index * ctx.base[BUDGET][name]
    return max(0, allowed - protected)
