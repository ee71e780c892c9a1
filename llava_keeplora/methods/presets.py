"""The places where the paper and the authors' released code differ, side by side.

Legend: in / out features of a layer, k protected dimensions, r rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Layer
from llava_keeplora.subspace import (
    DenseGradient,
    FeatureDirections,
    GradientSketch,
    PrincipalBasis,
    ResidualDirections,
    RunningMeanFeatures,
    SecondMoment,
    SecondPass,
    ShapeError,
    SketchedMoment,
    principal_basis,
    released_clip_extend,
    released_clip_weight_basis,
    released_llava_directions,
    released_llava_extend,
    released_llava_weight_basis,
    residual,
)
from llava_keeplora.subspace.feature_sketch import BYTES, SMALLEST

#: Bytes per number of an exact second moment in its smaller form.
EXACT = 4


class PaperRules:
    """What the paper says: arXiv 2601.19659, section 3."""

    form = "delta"
    #: How the first-step gradient is held unless the user says otherwise.
    gradient = "sketch"
    #: What M_t is taken from after a task: the layers' inputs, or the gradient.
    evidence = "features"
    #: On the adapters' input while training.
    dropout = 0.0
    #: Whether a gradient counts every example alike, and not every token.
    counts_examples = False
    #: Whether the features of the prompts are those of all positions.
    every_position = False
    #: Whether batches count in their order, which several processes don't have.
    one_process = False
    #: Whether its weight basis is one of square layers alone.
    square = False

    @staticmethod
    def weight_basis(weight: Tensor, energy: float) -> PrincipalBasis:
        """W_p: the input-side principal directions of W (out, in)."""
        return principal_basis(weight, energy)

    @staticmethod
    def statistics(
        groups: list[list[Layer]], bases: Mapping[str, Tensor], budget: int, seed: int
    ) -> dict[str, SecondMoment | SketchedMoment]:
        """Layer name → statistic of its features.

        Exact and one per distinct input where all of them fit the budget (bytes), else sketched.

        Raises:
            ShapeError: if not even the smallest sketches fit.
        """
        whole = sum(layers[0].module.in_features ** 2 for layers in groups)
        if budget >= EXACT * whole:
            dtype = torch.float64 if budget >= 2 * EXACT * whole else torch.float32
            exact: dict[str, SecondMoment | SketchedMoment] = {}
            for layers in groups:
                module = layers[0].module
                exact |= dict.fromkeys(
                    (layer.name for layer in layers),
                    SecondMoment(module.in_features, dtype, module.weight.device),
                )
            return exact
        # A sketch answers for one basis, so layers that read the same input have one each.
        layers = [layer for group in groups for layer in group]
        least, squares = smallest_sketches(layers), sum(layer.module.in_features**2 for layer in layers)
        if budget < least:
            raise ShapeError(
                f"{budget} bytes hold no sketch of {SMALLEST} directions for each of {len(layers)} layers, "
                f"which take {least} bytes"
            )
        found: dict[str, SecondMoment | SketchedMoment] = {}
        for layer in layers:
            width, device = layer.module.in_features, layer.module.weight.device
            share = smallest_sketches([layer]) + (budget - least) * width**2 // squares
            found[layer.name] = SketchedMoment(
                width, share // (BYTES * width), bases[layer.name], seed=seed, device=device
            )
        return found

    @staticmethod
    def extend(
        basis: Tensor, statistic: SecondMoment | SketchedMoment, energy: float, limit: int | None = None
    ) -> FeatureDirections:
        """The GPM rule on the residual features, up to a limit of directions."""
        return statistic.directions(basis, energy, limit)

    @staticmethod
    def directions(
        statistic: DenseGradient | GradientSketch, basis: Tensor, rank: int, *second: SecondPass
    ) -> ResidualDirections:
        """The top directions of the residual gradient, fewer where it has fewer."""
        return statistic.directions(rank, *second, allow_fewer=True)


def smallest_sketches(layers: Iterable[Layer]) -> int:
    """Bytes of the smallest sketches of these layers' features."""
    return sum(SMALLEST * BYTES * layer.module.in_features for layer in layers)


def least_statistics(layers: Sequence[Layer]) -> int:
    """Bytes that are sure to hold the statistics of these layers' features in some form."""
    return min(smallest_sketches(layers), EXACT * sum(layer.module.in_features**2 for layer in layers))


class ReleasedClipRules(PaperRules):
    """What the authors' released CLIP code does (MTIL folder), for comparison runs."""

    form = "literal"
    gradient = "dense"
    every_position = True
    one_process = True
    square = True

    @staticmethod
    def weight_basis(weight: Tensor, energy: float) -> PrincipalBasis:
        """Output-side directions, used on the input side: only square layers allow it."""
        return released_clip_weight_basis(weight, energy)

    @staticmethod
    def statistics(
        groups: list[list[Layer]], bases: Mapping[str, Tensor], budget: int, seed: int
    ) -> dict[str, "_RunningMean"]:
        """A running mean of the batch matrices, slot by slot."""
        return {layer.name: mean for layers in groups for mean in [_RunningMean()] for layer in layers}

    @staticmethod
    def extend(
        basis: Tensor, statistic: "_RunningMean", energy: float, limit: None = None
    ) -> FeatureDirections:
        """The GPM rule on that mean; the released code knows no limit."""
        return released_clip_extend(basis, statistic.mean.matrix.cpu(), energy)

    @staticmethod
    def directions(statistic: DenseGradient, basis: Tensor, rank: int) -> ResidualDirections:
        """`svd_lowrank(q=4r, niter=4)`; B₀ = S Vᵀ as in the paper."""
        gradient = statistic.matrix.cpu()
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
        """Add a batch (images, tokens, in).

        Padding is kept, as there, and a shorter last batch is left out.
        """
        self._shape = self._shape or x.shape
        if x.shape == self._shape:
            self.mean.add(x)
        else:
            self.dropped += len(x)

    @property
    def tensors(self) -> list[Tensor]:
        raise MethodError(
            "the released-clip preset averages batches in their order, which several processes don't have",
            "run it in one process",
        )


class ReleasedLlavaRules(PaperRules):
    """What the authors' released LLaVA code does (DCL_UCIT folder), for comparison runs.

    B from zero, no W'.
    """

    gradient = "dense"
    evidence = "gradient"
    dropout = 0.05
    counts_examples = True

    weight_basis = staticmethod(released_llava_weight_basis)

    @staticmethod
    def extend(
        basis: Tensor, statistic: DenseGradient, energy: float, limit: None = None
    ) -> FeatureDirections:
        """The GPM rule on the gradient (out, in) of the merged model; the released code knows no limit."""
        return released_llava_extend(basis, statistic.matrix.cpu(), energy)

    @staticmethod
    def directions(statistic: DenseGradient, basis: Tensor, rank: int) -> ResidualDirections:
        """`svd_lowrank(q=r)` without oversampling, A rounded to fp16."""
        return released_llava_directions(statistic.matrix.cpu(), basis, rank)


RULES = {"paper": PaperRules, "released-clip": ReleasedClipRules, "released-llava": ReleasedLlavaRules}
