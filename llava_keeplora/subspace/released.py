"""The authors' released code, where it departs from the paper, kept exact for comparison runs.

`released-clip` takes the weight basis from the OUTPUT side and projects on the input side; `released-llava`
extends the basis from gradients instead of features, and rounds A to half precision. Both keep one weight
direction fewer than the energy rule asks for, but at least one.

Shapes: weight (out, in), basis (in, k), features (images, tokens, in), mean (in, images * tokens), A (in, r).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llava_keeplora.subspace.basis import check_basis, check_finite, residual
from llava_keeplora.subspace.errors import ShapeError
from llava_keeplora.subspace.features import FeatureDirections, feature_directions
from llava_keeplora.subspace.gradients import ResidualDirections, above_rounding, room_for
from llava_keeplora.subspace.principal import PrincipalBasis, principal_basis


def released_clip_weight_basis(weight: Float[Tensor, "out in"], energy: float) -> PrincipalBasis:
    """Weight basis of the `released-clip` preset: LEFT singular vectors of W under the strict rule.

    Source: github.com/MaolinLuo/KeepLoRA, folder MTIL; the paper asks for the right singular vectors.

    Args:
        weight: W, (out, in), square: the code uses the output-side vectors on the input side.
        energy: epsilon_w, in (0, 1].

    Raises:
        ShapeError: if the weight isn't square.
    """
    if weight.shape[0] != weight.shape[1]:
        raise ShapeError(
            "the released-clip preset takes the basis from a weight's output side and applies it to the "
            "input side, "
            f"which only a square weight allows, but this one is {tuple(weight.shape)}"
        )
    return principal_basis(weight.T, energy, strict=True)


class RunningMeanFeatures:
    """Features of the `released-clip` preset: the transposed batch matrices, averaged slot by slot.

    Column j of every batch, whatever image it shows, is summed into column j, and the sum is divided by the
    number of columns seen (not of batches). So features of unrelated images mix, which second moments don't
    do.

    Source: github.com/MaolinLuo/KeepLoRA, folder MTIL.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.columns = 0

    @torch.no_grad()
    def add(self, batch: Float[Tensor, "images tokens in"]) -> None:
        """Add one batch.

        Args:
            batch: (images, tokens, in), the same number of images and tokens every time.

        Raises:
            ShapeError: if the batch's shape isn't that of the first one.
        """
        slots = batch.detach().double().flatten(0, 1).T
        if self._sum is not None and self._sum.shape != slots.shape:
            raise ShapeError(
                f"the released-clip running mean needs equal batches, {tuple(self._sum.shape)} (in, images * "
                "tokens), "
                f"but got {tuple(slots.shape)}; drop the last batch"
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
    """New directions of the `released-clip` preset: the feature rule on the running mean's columns.

    Source: github.com/MaolinLuo/KeepLoRA, folder MTIL.

    Args:
        basis: (in, k), orthonormal columns.
        mean: (in, images * tokens), from `RunningMeanFeatures`.
        energy: epsilon_f, in (0, 1].
    """
    columns = mean.detach().double()
    return feature_directions(columns @ columns.T, basis, energy)


def released_llava_weight_basis(weight: Float[Tensor, "out in"], energy: float) -> PrincipalBasis:
    """Weight basis of the `released-llava` preset: right singular vectors under the strict rule.

    Source: github.com/MaolinLuo/KeepLoRA, folder DCL_UCIT.

    Args:
        weight: W, (out, in).
        energy: epsilon_w, in (0, 1].
    """
    return principal_basis(weight, energy, strict=True)


def released_llava_extend(
    basis: Float[Tensor, "in k"], gradient: Float[Tensor, "out in"], energy: float
) -> FeatureDirections:
    """New directions of the `released-llava` preset: the feature rule on the merged model's GRADIENT.

    Source: github.com/MaolinLuo/KeepLoRA, folder DCL_UCIT; the paper takes the layer's inputs instead.

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
    """Adapter directions of the `released-llava` preset.

    A randomised SVD without oversampling, A rounded to float16.

    Both shortcuts cost something that the paper's rule doesn't: the last of the r directions are blurred, and
    A is orthonormal and outside the basis to 1e-3 only. The preset starts B at 0 and leaves W as it is, so
    the singular values and V are handed back for reports alone.

    Source: github.com/MaolinLuo/KeepLoRA, folder DCL_UCIT, `svd_lowrank(q=r)`.

    Args:
        gradient: G, (out, in), on the model before the task.
        basis: (in, k), orthonormal columns.
        rank: r; fewer directions come back where the residual gradient has fewer.
        seed: of the randomised SVD; the global random state is left alone.

    Raises:
        ShapeError: if the basis doesn't fit the gradient.
        NonFiniteError: if the gradient holds NaN or infinity.
        RankError: if r is below 1 or no gradient is left outside the basis.
    """
    check_basis(basis, gradient.shape[1], "a gradient")
    check_finite(gradient, "gradient")
    out_dim, in_dim = gradient.shape
    room = room_for(rank, out_dim, in_dim, basis.shape[1], allow_fewer=True)
    gradient = gradient.detach().float()
    outside = residual(gradient, basis)
    with torch.random.fork_rng(devices=[gradient.device] if gradient.is_cuda else []):
        torch.manual_seed(seed)
        left, singular, right = torch.svd_lowrank(outside.T, q=min(rank, room))
    norm, left_over = float(gradient.norm()), float(outside.square().sum())
    found = above_rounding(singular, norm, rank, room, allow_fewer=True)
    return ResidualDirections(
        A=left[:, :found].half().float().contiguous(),
        singular_values=singular[:found],
        right=right[:, :found].contiguous(),
        captured=min(1.0, float(singular[:found].square().sum()) / left_over),
        residual_energy=left_over / norm**2,
    )
