"""Gaussians fitted to groups of vectors, and their log-densities.

Legend: n vectors, p their width, k Gaussians.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussians:
    """k Gaussians, given by mean and Cholesky factor, Σ = L Lᵀ.

    Args:
        means: (k, p).
        factors: L (k, p, p), lower triangular.
    """

    means: Tensor
    factors: Tensor

    @classmethod
    def fit(cls, groups: Sequence[Tensor], ridge: float) -> Gaussians:
        """Fit one Gaussian per group: its mean, and its covariance (divided by n − 1) plus the ridge.

        The covariance of a single vector is the ridge alone.

        Args:
            groups: (n, p) each, n at least 1.
            ridge: added to the covariances' diagonals.
        """
        means, factors = [], []
        for rows in groups:
            rows = rows.double()
            means.append(rows.mean(dim=0))
            centred = rows - means[-1]
            covariance = centred.T @ centred / max(len(rows) - 1, 1)
            covariance.diagonal().add_(ridge)
            factors.append(torch.linalg.cholesky(covariance).float())
        return cls(torch.stack(means).float(), torch.stack(factors))

    def log_density(self, x: Tensor, scale: float) -> Tensor:
        """Return log N(x; μ, scale · Σ) in fp64, (n, k), computed one Gaussian at a time to save memory.

        Args:
            x: (n, p).
            scale: factor on the covariances.
        """
        x, densities = x.double(), []
        for mean, factor in zip(self.means.to(x.device), self.factors):
            factor = factor.to(x)
            squared = (
                torch.linalg.solve_triangular(factor, (x - mean).T, upper=False).square().sum(dim=0) / scale
            )
            spread = 2 * factor.diagonal().log().sum() + x.shape[1] * math.log(2 * math.pi * scale)
            densities.append(-0.5 * (squared + spread))
        return torch.stack(densities, dim=1)
