"""The rules in which the paper and the authors' released code differ, one class per preset.

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

#: Bytes per number of an exact second moment in fp32.
EXACT = 4


class PaperRules:
    """The paper's rules: arXiv 2601.19659, section 3."""

    form = "delta"
    #: How the first-step gradient is summed by default: `sketch` or `dense`.
    gradient = "sketch"
    #: What M_t is taken from after a task: `features`, the layers' inputs, or `gradient`.
    evidence = "features"
    #: Dropout on the adapters' input while training.
    dropout = 0.0
    #: Whether a gradient weighs all examples equally, instead of all tokens.
    counts_examples = False
    #: Whether the prompts' features are taken at all positions.
    every_position = False
    #: Whether results depend on the order of batches, so that only one process can compute them.
    one_process = False
    #: Whether its weight basis requires square layers.
    square = False
    #: Whether it follows released code, whose numbers are fixed, while the paper's may come from the data.
    released = False
    #: What share of a task's update is merged.
    interpolation = 1.0
    #: The weight of keeping image features near those of the task's start.
    distillation = 0.0
    #: The largest share of a task's training examples that may be taken for none of its kind; 0 for no test.
    rejection = 0.0

    @staticmethod
    def weight_basis(weight: Tensor, energy: float) -> PrincipalBasis:
        """Return W_p, the input-side principal directions of W (out, in)."""
        return principal_basis(weight, energy)

    @staticmethod
    def statistics(
        groups: list[list[Layer]], bases: Mapping[str, Tensor], budget: int, seed: int
    ) -> dict[str, SecondMoment | SketchedMoment]:
        """Return layer name → statistic of its features.

        If all fit into the budget (bytes), they are exact, one per distinct input; else they are sketched,
        one per layer.

        Raises:
            ShapeError: if not even the smallest sketches fit.
        """
        numbers = sum(layers[0].module.in_features ** 2 for layers in groups)
        if budget >= EXACT * numbers:
            dtype = torch.float64 if budget >= 2 * EXACT * numbers else torch.float32
            exact: dict[str, SecondMoment | SketchedMoment] = {}
            for layers in groups:
                module = layers[0].module
                exact |= dict.fromkeys(
                    (layer.name for layer in layers),
                    SecondMoment(module.in_features, dtype, module.weight.device),
                )
            return exact
        # A sketch belongs to one basis, so layers that read the same input have one each.
        layers = [layer for group in groups for layer in group]
        least, squares = smallest_sketches(layers), sum(layer.module.in_features**2 for layer in layers)
        if budget < least:
            raise ShapeError(
                f"sketches of {SMALLEST} directions for each of {len(layers)} layers take at least {least} "
                f"bytes, but the limit is {budget} bytes"
            )
        sketches: dict[str, SecondMoment | SketchedMoment] = {}
        for layer in layers:
            width, device = layer.module.in_features, layer.module.weight.device
            share = smallest_sketches([layer]) + (budget - least) * width**2 // squares
            sketches[layer.name] = SketchedMoment(
                width, share // (BYTES * width), bases[layer.name], seed=seed, device=device
            )
        return sketches

    @staticmethod
    def extend(
        basis: Tensor,
        statistic: SecondMoment | SketchedMoment,
        energy: float,
        limit: int | None = None,
        least: float = 0.0,
    ) -> FeatureDirections:
        """Return new directions by the GPM rule on the residual features.

        They are at most `limit`, each with more than the share `least` of the features' energy.
        """
        return statistic.directions(basis, energy, limit, least)

    @staticmethod
    def directions(
        statistic: DenseGradient | GradientSketch, basis: Tensor, rank: int, *second: SecondPass
    ) -> ResidualDirections:
        """Return the top directions of the residual gradient, fewer if its rank is lower."""
        return statistic.directions(rank, *second, allow_fewer=True)


def smallest_sketches(layers: Iterable[Layer]) -> int:
    """Return the bytes of the smallest sketches of these layers' features."""
    return sum(SMALLEST * BYTES * layer.module.in_features for layer in layers)


def least_statistics(layers: Sequence[Layer]) -> int:
    """Return the bytes that suffice for the statistics of these layers' features in some form."""
    return min(smallest_sketches(layers), EXACT * sum(layer.module.in_features**2 for layer in layers))


class ReleasedClipRules(PaperRules):
    """The rules of the authors' released CLIP code (folder MTIL), for comparison runs."""

    form = "literal"
    gradient = "dense"
    released = True
    every_position = True
    one_process = True
    square = True

    @staticmethod
    def weight_basis(weight: Tensor, energy: float) -> PrincipalBasis:
        """Return output-side directions, which are used on the input side; only square layers allow it."""
        return released_clip_weight_basis(weight, energy)

    @staticmethod
    def statistics(
        groups: list[list[Layer]], bases: Mapping[str, Tensor], budget: int, seed: int
    ) -> dict[str, "_RunningMean"]:
        """Return layer name → a running mean of the batch matrices, slot by slot."""
        return {layer.name: mean for layers in groups for mean in [_RunningMean()] for layer in layers}

    @staticmethod
    def extend(
        basis: Tensor, statistic: "_RunningMean", energy: float, limit: None = None, least: float = 0.0
    ) -> FeatureDirections:
        """Return new directions by the GPM rule on that mean; the released code has no limit."""
        return released_clip_extend(basis, statistic.mean.matrix.cpu(), energy)

    @staticmethod
    def directions(statistic: DenseGradient, basis: Tensor, rank: int) -> ResidualDirections:
        """Return the top directions by `svd_lowrank(q=4r, niter=4)`; B₀ = S Vᵀ as in the paper."""
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
    """`RunningMeanFeatures` with the interface of a statistic, for complete batches of equal shape."""

    def __init__(self) -> None:
        self.mean = RunningMeanFeatures()
        self.dropped = 0
        self._shape: torch.Size | None = None

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add a batch (images, tokens, in), padding included.

        A shorter last batch is left out, as in the released code, which drops it.
        """
        self._shape = self._shape or x.shape
        if x.shape == self._shape:
            self.mean.add(x)
        else:
            self.dropped += len(x)

    @property
    def tensors(self) -> list[Tensor]:
        raise MethodError(
            "the preset 'released-clip' averages batches in their order, which several processes do not keep",
            "run it in one process",
        )


class ReleasedLlavaRules(PaperRules):
    """The rules of the authors' released LLaVA code (folder DCL_UCIT), for comparison runs.

    B starts from zero, on the unchanged weight W instead of W'.
    """

    gradient = "dense"
    released = True
    evidence = "gradient"
    dropout = 0.05
    counts_examples = True

    weight_basis = staticmethod(released_llava_weight_basis)

    @staticmethod
    def extend(
        basis: Tensor, statistic: DenseGradient, energy: float, limit: None = None, least: float = 0.0
    ) -> FeatureDirections:
        """Return new directions by the GPM rule on the merged model's gradient (out, in), without limit."""
        return released_llava_extend(basis, statistic.matrix.cpu(), energy)

    @staticmethod
    def directions(statistic: DenseGradient, basis: Tensor, rank: int) -> ResidualDirections:
        """Return the top directions by `svd_lowrank(q=r)` without oversampling, A rounded to fp16."""
        return released_llava_directions(statistic.matrix.cpu(), basis, rank)


class BalancedRules(PaperRules):
    """The paper's rules, with image features kept near those of the task's start: Transfer beside learning.

    The weight is the one that was best on held-out data, see docs/results-tried.md.
    """

    distillation = 10.0


class BalancedRejectionRules(BalancedRules):
    """The same, and the untouched base answers what resembles no learned task: more Transfer, but no merge.

    The share is one of a range with nearly the same results, see docs/results.md.
    """

    rejection = 0.05


RULES = {
    "paper": PaperRules,
    "balanced": BalancedRules,
    "balanced-rejection": BalancedRejectionRules,
    "released-clip": ReleasedClipRules,
    "released-llava": ReleasedLlavaRules,
}
