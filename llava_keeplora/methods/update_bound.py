"""A bound on what a task may change in a layer, relative to the weights that it leaves unprotected.

    ‖ΔW‖_F ≤ c ‖W (I − M' M'ᵀ)‖_F

with W the weight at the task's start and M' the protected subspace then: the free directions are those in
which a weight does little, and an update of the same norm as what the weight does there already doubles it.
A longer update is merged as the share of itself that reaches the bound, layer by layer. It is no part of
KeepLoRA's paper.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llava_keeplora.adapters import Delta, Deltas, FullDelta
from llava_keeplora.adapters.base import merged_weight
from llava_keeplora.adapters.project import squared_norm
from llava_keeplora.adapters.task_vectors import scale_deltas
from llava_keeplora.methods.base import TaskContext
from llava_keeplora.methods.layers import in_layer
from llava_keeplora.subspace import residual


@torch.no_grad()
def bounded_deltas(ctx: TaskContext, deltas: Deltas, bases: Mapping[str, Tensor], bound: float) -> Deltas:
    """Return every layer's update, or the share of it that reaches the bound.

    The shares are recorded as `update_shares`: layer name → share, for every layer.

    Args:
        ctx: of the task that was trained, on the weights of its start.
        deltas: layer name → ΔW.
        bases: layer name → M', (in, k).
        bound: c.
    """
    bounded: dict[str, Delta | FullDelta] = {}
    shares = {}
    for name, delta in deltas.items():
        with in_layer(ctx.layers[name]):
            weight = merged_weight(name, ctx.layers[name].module, ctx.deltas())
            free = float(residual(weight, bases[name].to(weight)).double().norm())
        norm = squared_norm(delta) ** 0.5
        shares[name] = min(1.0, bound * free / norm) if norm else 1.0
        bounded |= scale_deltas({name: delta}, shares[name])
    ctx.report["update_shares"] = shares
    return bounded
