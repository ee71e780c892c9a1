"""The rules of the authors' released code where they differ from the paper, reproduced for comparison runs.

`released-clip` takes the weight basis from the OUTPUT side and projects on the input side; `released-llava`
extends the basis from gradients instead of features, and rounds A to half precision. Both keep one weight
direction fewer than the energy rule requires, but at least one.

Shapes: weight (out, in), basis (in, k), features (images, tokens, in), mean (in, images * tokens), A (in, r).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llava_keeplora.subspace.basis import check_basis, check_finite, residual
from llava_keeplora.subspace.errors import ShapeError
from llava_keeplora.subspace.features import FeatureDirections, feature_directions
from llava_keeplora.subspace.gradients import ResidualDirections, above_rounding, max_directions
from llava_keeplora.subspace.principal import PrincipalBasis, principal_basis


def released_clip_weight_basis(weight: Float[Tensor, "out in"], energy: float) -> PrincipalBasis:
    """Return the weight basis of the `released-clip` preset: LEFT singular vectors of W by the strict rule.

    Source: github.com/MaolinLuo/KeepLoRA, folder MTIL; the paper uses the right singular vectors.

    Args:
        weight: W, (out, in), square, because output-side vectors are used on the input side.
        energy: epsilon_w, in (0, 1].

    Raises:
        ShapeError: if the weight isn't square.
    """
    if weight.shape[0] != weight.shape[1]:
        raise ShapeError(
            "the released-clip preset takes the basis from a weight's output side and applies it to the "
            f"input side, which requires a square weight, but this one is {tuple(weight.shape)}"
        )
    return principal_basis(weight.T, energy, strict=True)


class RunningMeanFeatures:
    """Features of the `released-clip` preset: the transposed batch matrices, averaged slot by slot.

    Column j of every batch, whatever its image, is summed into column j, and the sum is divided by the number
    of columns added (not of batches). So features of unrelated images are mixed, unlike in second moments.

    Source: github.com/MaolinLuo/KeepLoRA, folder MTIL.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.columns = 0

    @torch.no_grad()
    def add(self, batch: Float[Tensor, "images tokens in"]) -> None:
        """Add one batch.

        Args:
            batch: (images, tokens, in), with the same number of images and tokens every time.

        Raises:
            ShapeError: if the batch's shape differs from the first one's.
        """
        slots = batch.detach().double().flatten(0, 1).T
        if self._sum is not None and self._sum.shape != slots.shape:
            raise ShapeError(
                f"the released-clip running mean needs equal batches, {tuple(self._sum.shape)} (in, images * "
                f"tokens), but got {tuple(slots.shape)}; drop the last batch"
            )
        self._sum = slots.clone() if self._sum is None else self._sum.add_(slots)
        self.columns += slots.shape[1]

    @property
    def matrix(self) -> Float[Tensor, "in slots"]:
        """The mean, (in, images * tokens), float32.

        Raises:
            ShapeError: before the first batch.
        """
        if self._sum is None:
            raise ShapeError("the running mean has no batch yet")
        return (self._sum / self.columns).float()


def released_clip_extend(
    basis: Float[Tensor, "in k"], mean: Float[Tensor, "in slots"], energy: float
) -> FeatureDirections:
    """Return new directions of the `released-clip` preset: the feature rule on the running mean's columns.

    Source: github.com/MaolinLuo/KeepLoRA, folder MTIL.

    Args:
        basis: (in, k), orthonormal columns.
        mean: (in, images * tokens), from `RunningMeanFeatures`.
        energy: epsilon_f, in (0, 1].
    """
    columns = mean.detach().double()
    return feature_directions(columns @ columns.T, basis, energy)


def released_llava_weight_basis(weight: Float[Tensor, "out in"], energy: float) -> PrincipalBasis:
    """Return the weight basis of the `released-llava` preset: right singular vectors by the strict rule.

    Source: github.com/MaolinLuo/KeepLoRA, folder DCL_UCIT.

    Args:
        weight: W, (out, in).
        energy: epsilon_w, in (0, 1].
    """
    return principal_basis(weight, energy, strict=True)


def released_llava_extend(
    basis: Float[Tensor, "in k"], gradient: Float[Tensor, "out in"], energy: float
) -> FeatureDirections:
    """Return new directions of the `released-llava` preset: the feature rule on the merged model's GRADIENT.

    Source: github.com/MaolinLuo/KeepLoRA, folder DCL_UCIT; the paper uses the layer's inputs instead.

    Args:
        basis: (in, k), orthonormal columns.
        gradient: G, (out, in), on the model after the task.
        energy: epsilon_f, in (0, 1].
    """
    rows = gradient.detach().double()
    return feature_directions(rows.T @ rows, basis, energy)


def released_llava_directions(
    gradient: Float[Tensor, "out in"], basis: Float[Tensor, "in k"], rank: int, *, seed: int = 0
) -> ResidualDirections:
    """Return the adapter directions of the `released-llava` preset.

    They come from a randomised SVD without oversampling, and A is rounded to float16. Both reduce accuracy:
    the last of the r directions are inexact, and A is orthonormal and outside the basis only to 1e-3. The
    preset starts with B = 0 and an unchanged W, so the singular values and V are returned for reports alone.

    Source: github.com/MaolinLuo/KeepLoRA, folder DCL_UCIT, `svd_lowrank(q=r)`.

    Args:
        gradient: G, (out, in), on the model before the task.
        basis: (in, k), orthonormal columns.
        rank: r; fewer directions are returned if the residual gradient has fewer.
        seed: seed of the randomised SVD; the global random state is not changed.

    Raises:
        ShapeError: if the basis doesn't fit the gradient.
        NonFiniteError: if the gradient holds NaN or infinity.
        RankError: if r is below 1 or no gradient is left outside the basis.
    """
    check_basis(basis, gradient.shape[1], "a gradient")
    check_finite(gradient, "gradient")
    out_dim, in_dim = gradient.shape
    most = max_directions(rank, out_dim, in_dim, basis.shape[1], allow_fewer=True)
    gradient = gradient.detach().float()
    outside = residual(gradient, basis)
    with torch.random.fork_rng(devices=[gradient.device] if gradient.is_cuda else []):
        torch.manual_seed(seed)
        left, singular, right = torch.svd_lowrank(outside.T, q=min(rank, most))
    norm, left_over = float(gradient.norm()), float(outside.square().sum())
    count = above_rounding(singular, norm, rank, most, allow_fewer=True)
    return ResidualDirections(
        A=left[:, :count].half().float().contiguous(),
        singular_values=singular[:count],
        right=right[:, :count].contiguous(),
        captured=min(1.0, float(singular[:count].square().sum()) / left_over),
        residual_energy=left_over / norm**2,
    )
