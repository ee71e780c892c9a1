"""The places where the paper and the authors' released code differ, side by side.

Legend: in / out features of a layer, k protected dimensions, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_keeplora.errors import MethodError
from llava_keeplora.subspace import (
    FeatureDirections,
    PrincipalBasis,
    ResidualDirections,
    RunningMeanFeatures,
    SecondMoment,
    feature_directions,
    principal_basis,
    released_clip_extend,
    released_clip_weight_basis,
    released_llava_directions,
    released_llava_extend,
    released_llava_weight_basis,
    residual,
    residual_gradient_directions,
)


class PaperRules:
    """What the paper says: arXiv 2601.19659, section 3."""

    form = "delta"
    #: What M_t is taken from after a task: the layers' inputs, or the gradient.
    evidence = "features"
    #: On the adapters' input while training.
    dropout = 0.0

    @staticmethod
    def weight_basis(weight: Tensor, energy: float) -> PrincipalBasis:
        """W_p: the input-side principal directions of W (out, in)."""
        return principal_basis(weight, energy)

    @staticmethod
    def statistic(width: int) -> SecondMoment:
        """Second moments of the features."""
        return SecondMoment(width)

    @staticmethod
    def extend(basis: Tensor, statistic: SecondMoment, energy: float) -> FeatureDirections:
        """The GPM rule on the residual features."""
        return feature_directions(statistic.matrix, basis, energy)

    @staticmethod
    def directions(gradient: Tensor, basis: Tensor, rank: int) -> ResidualDirections:
        """The top directions of the residual gradient, fewer where it has fewer."""
        return residual_gradient_directions(gradient, basis, rank, allow_fewer=True)


class ReleasedClipRules(PaperRules):
    """What the authors' released CLIP code does (MTIL folder), for comparison runs."""

    form = "literal"

    @staticmethod
    def weight_basis(weight: Tensor, energy: float) -> PrincipalBasis:
        """Output-side directions, used on the input side: only square layers allow it."""
        return released_clip_weight_basis(weight, energy)

    @staticmethod
    def statistic(width: int) -> "_RunningMean":
        """A running mean of the batch matrices, slot by slot."""
        return _RunningMean()

    @staticmethod
    def extend(basis: Tensor, statistic: "_RunningMean", energy: float) -> FeatureDirections:
        """The GPM rule on that mean."""
        return released_clip_extend(basis, statistic.mean.matrix, energy)

    @staticmethod
    def directions(gradient: Tensor, basis: Tensor, rank: int) -> ResidualDirections:
        """`svd_lowrank(q=4r, niter=4)`; B₀ = S Vᵀ as in the paper."""
        outside = residual(gradient.float(), basis)
        u, s, v = torch.svd_lowrank(outside.T, q=min(4 * rank, *outside.shape), niter=4)
        energy = float(outside.square().sum())
        return ResidualDirections(
            A=u[:, :rank].contiguous(),
            singular_values=s[:rank],
            right=v[:, :rank].contiguous(),
            captured=float(s[:rank].square().sum()) / energy,
            residual_energy=energy / float(gradient.square().sum()),
        )


class _RunningMean:
    """`RunningMeanFeatures` behind the accumulator interface; the released code feeds whole equal batches."""

    def __init__(self) -> None:
        self.mean = RunningMeanFeatures()
        self.dropped = 0
        self._shape: torch.Size | None = None

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add a batch (images, tokens, in); padding is kept, as there, and a shorter last batch is left out."""
        self._shape = self._shape or x.shape
        if x.shape == self._shape:
            self.mean.add(x)
        else:
            self.dropped += len(x)

    @property
    def tensors(self) -> list[Tensor]:
        raise MethodError("the released-clip preset averages batches in their order, which several processes don't have", "run it in one process")


class ReleasedLlavaRules(PaperRules):
    """What the authors' released LLaVA code does (DCL_UCIT folder), for comparison runs: B from zero, no W'."""

    evidence = "gradient"
    dropout = 0.05

    weight_basis = staticmethod(released_llava_weight_basis)
    extend = staticmethod(released_llava_extend)
    directions = staticmethod(released_llava_directions)


RULES = {"paper": PaperRules, "released-clip": ReleasedClipRules, "released-llava": ReleasedLlavaRules}
