"""Exact second moments of the inputs of a task's layers, one for layers that read the same tensor.

Legend: in features of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Layer, TaskContext
from llava_keeplora.subspace import SecondMoment, ShapeError

#: Separator of the names of layers that read the same tensor, in a state's keys.
AND = "|"
F32, F64 = 4, 8


def least_moments(layers: Mapping[str, Layer]) -> int:
    """Return the bytes of the moments in fp32, counted once for layers of the same module and width.

    This is a lower bound: layers of the same module may still read different tensors.
    """
    distinct = {(name.rpartition(".")[0], layer.module.in_features) for name, layer in layers.items()}
    return F32 * sum(width**2 for _, width in distinct)


class InputMoment(SecondMoment):
    """Σ x xᵀ, with the number of rows as a tensor that is summed over processes too.

    A prompt's rows are added once per batch and process, so that only the mean does not depend on either.
    """

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device):
        super().__init__(dim, dtype, device)
        self.rows = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add rows; see `SecondMoment.add`."""
        before = self.count
        super().add(x, mask)
        self.rows += self.count - before

    @property
    def tensors(self) -> list[Tensor]:
        """The sum and the number of rows."""
        return [*super().tensors, self.rows]

    @property
    def mean(self) -> Tensor:
        """Return the mean of x xᵀ (in, in) in fp64; zeros without a row."""
        return self.matrix.double() / self.rows.clamp_min(1.0)


def second_moments(groups: Sequence[Sequence[Layer]], budget: int) -> dict[str, InputMoment]:
    """Return layer name → an empty second moment, the same for layers of a group; in fp64 where that fits.

    Args:
        groups: the layers, grouped by the tensor that they read.
        budget: the bytes that all moments may take.

    Raises:
        ShapeError: if they exceed the budget even in fp32.
    """
    numbers = sum(layers[0].module.in_features ** 2 for layers in groups)
    if F32 * numbers > budget:
        raise ShapeError(f"they take {F32 * numbers / 1e9:.2g} GB, but the limit is {budget / 1e9:.2g}")
    dtype = torch.float64 if F64 * numbers <= budget else torch.float32
    moments: dict[str, InputMoment] = {}
    for layers in groups:
        module = layers[0].module
        moment = InputMoment(module.in_features, dtype, module.weight.device)
        moments |= dict.fromkeys((layer.name for layer in layers), moment)
    return moments


def input_moments(ctx: TaskContext) -> Iterator[tuple[tuple[str, ...], InputMoment]]:
    """Yield (names of layers that read the same tensor, Σ x xᵀ over the task's data).

    Raises:
        MethodError: if the moments of all layers exceed `memory.statistics_gb`.
    """
    moments: dict[tuple[str, ...], InputMoment] = {}

    def make(groups: list[list[str]]) -> dict[str, InputMoment]:
        try:
            made = second_moments(
                [[ctx.layers[name] for name in names] for names in groups], ctx.statistics_bytes
            )
        except ShapeError as error:
            numbers = sum(ctx.layers[names[0]].module.in_features ** 2 for names in groups)
            raise MethodError(
                f"the inputs' second moments for task '{ctx.name}' take {F32 * numbers / 1e9:.2g} GB, "
                f"but memory.statistics_gb is {ctx.statistics_bytes / 1e9:.2g}",
                "raise memory.statistics_gb, or adapt k_proj and v_proj alone as the paper does",
            ) from error
        moments.update({tuple(names): made[names[0]] for names in groups})
        return made

    reached = set(ctx.features(make))
    for names in [names for names in moments if names[0] in reached]:
        yield names, moments.pop(names)
