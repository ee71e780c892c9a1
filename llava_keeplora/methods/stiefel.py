"""AdamW on the Stiefel manifold: matrices with orthonormal columns that stay so after every step.

Source: EBLoRA (arXiv 2602.00722) and its code (haodotgu/EBLoRA), after StelLA.

Shapes: X (d, r) with orthonormal columns, gradient G (d, r), F (d, k) a subspace that X stays orthogonal to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Frame:
    """How a parameter holds X.

    Args:
        transposed: whether it holds Xᵀ.
        basis: F with orthonormal columns, on the parameter's device; None if X is free.
        width: d for the scale of its steps, see `StiefelAdamW`.
    """

    transposed: bool
    basis: Tensor | None
    width: int

    def of(self, value: Tensor) -> Tensor:
        """Return X, or a change of it, from a tensor like the parameter, in fp32 or higher."""
        value = value.mT if self.transposed else value
        return value if value.dtype == torch.float64 else value.float()

    def outside(self, X: Tensor) -> Tensor:
        """Return (I − F Fᵀ) X."""
        return X if self.basis is None else X - self.basis.to(X) @ (self.basis.to(X).T @ X)


class StiefelAdamW(torch.optim.AdamW):
    """AdamW whose steps of some parameters are moved back onto the Stiefel manifold.

    For these, the gradient becomes G − X (Gᵀ X), without its part in F; the change D that AdamW makes is
    divided by √(width / reference), projected to D − X (Dᵀ X), without its part in F, and X + D is replaced
    by the orthogonal factor of its polar decomposition. Weight decay changes X along X, which the projection
    removes. The state is that of AdamW alone.

    Args:
        groups: parameter groups of AdamW.
        frames: parameter → how it holds X; others are trained by AdamW.
        reference: the width at which steps are as long as AdamW's.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], frames: Mapping[nn.Parameter, Frame], reference: float
    ):
        super().__init__(list(groups))
        self._frames, self._reference = dict(frames), reference

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; see the class."""
        before: dict[nn.Parameter, Tensor] = {}
        for parameter, frame in self._frames.items():
            if parameter.grad is None:
                continue
            before[parameter] = X = frame.of(parameter).clone()
            G = tangent(X, frame.outside(frame.of(parameter.grad)))
            parameter.grad.copy_(G.mT if frame.transposed else G)
        loss = super().step(closure)
        moved: dict[torch.Size, dict[nn.Parameter, Tensor]] = defaultdict(dict)
        for parameter, X in before.items():
            frame = self._frames[parameter]
            D = (frame.of(parameter) - X) / math.sqrt(frame.width / self._reference)
            moved[X.shape][parameter] = frame.outside(X + tangent(X, frame.outside(D)))
        for alike in moved.values():
            # One batched decomposition for all matrices of a shape.
            for parameter, X in zip(alike, polar(torch.stack(list(alike.values()))), strict=True):
                parameter.copy_(X.mT if self._frames[parameter].transposed else X)
        return loss


def tangent(X: Tensor, G: Tensor) -> Tensor:
    """Return G − X (Gᵀ X), a tangent of the Stiefel manifold at X (d, r)."""
    return G - X @ (G.mT @ X)


def polar(X: Tensor) -> Tensor:
    """Return the orthogonal factor U Vᵀ of X = U S Vᵀ, the nearest matrix with orthonormal columns."""
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh
