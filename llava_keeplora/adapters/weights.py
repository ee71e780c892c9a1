"""The weight of a linear layer in floating point, whether it is stored plain, quantised or sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llava_keeplora.deepspeed_zero import gathered, is_partitioned


def is_quantised(layer: nn.Module) -> bool:
    """Return whether a module has a weight that is stored in bitsandbytes' 4-bit or 8-bit form."""
    weight = getattr(layer, "weight", None)
    return weight is not None and not weight.is_floating_point()


@torch.no_grad()
def dense_weight(layer: nn.Linear) -> Tensor:
    """Return a layer's weight (out, in) in floating point, on its device.

    A plain layer's weight is returned itself, without a copy; a quantised one is dequantised into a new
    tensor. A weight sharded by ZeRO-3 is gathered into a new tensor, for which every process must call this.

    Args:
        layer: an `nn.Linear` or bitsandbytes' `Linear4bit` or `Linear8bitLt`.
    """
    if is_partitioned(layer.weight):
        with gathered([layer.weight]):
            return layer.weight.detach().clone()
    if not is_quantised(layer):
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    weight: Any = layer.weight  # A `Params4bit` or `Int8Params`.
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return dequantize_4bit(weight.data, state).reshape(layer.out_features, layer.in_features)
    # The first forward pass moves the rows' scales from the weight to the layer's state.
    scales = weight.SCB if weight.SCB is not None else layer.state.SCB
    return int8_vectorwise_dequant(weight.data, scales)
