"""A model without weights, on the meta device.

Its layers, shapes and dtypes as a load would give them, for planning.

Quantised linear layers are stood in for: they hold as many bytes as bitsandbytes' would, and a pass through
one makes the tensors that bitsandbytes' would.

Legend: in / out features of a layer. Source of the forms: Dettmers et al., QLoRA (2023, arXiv:2305.14314) and
LLM.int8() (2022, arXiv:2208.07339).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

# QLoRA: a scale per 64 weights, kept as one byte, and a scale of these scales per 256 of them.
BLOCK, SCALES = 64, 256


def build_meta_model(
    make: Callable[[], nn.Module], quantization: str | None, skip_quantization: Collection[str]
) -> nn.Module:
    """Build a frozen model on the meta device.

    Args:
        make: makes the model from its configuration.
        quantization: `nf4`, `int8` or None.
        skip_quantization: dotted prefixes of what is left as it is where the other linear layers are
            quantised.
    """
    with torch.device("meta"):
        model = make()
        for name, layer in list(model.named_modules()) if quantization else ():
            if type(layer) is nn.Linear and not f"{name}.".startswith(
                tuple(f"{prefix}." for prefix in skip_quantization)
            ):
                model.set_submodule(name, QuantisedLinear(layer, quantization))
    return model.eval().requires_grad_(False)


class QuantisedLinear(nn.Linear):
    """Stands for bitsandbytes' `Linear4bit` (double-quantised NF4) or `Linear8bitLt`.

    Args:
        layer: whose shape and dtype it takes.
        kind: `nf4` or `int8`.
    """

    def __init__(self, layer: nn.Linear, kind: str):
        super().__init__(
            layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype
        )
        self.dtype, numbers = layer.weight.dtype, layer.weight.numel()
        if kind == "nf4":
            blocks = -(-numbers // BLOCK)
            weight = torch.empty(-(-numbers // 2), 1, dtype=torch.uint8)
            self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8), persistent=False)
            self.register_buffer("absmax_scales", torch.empty(-(-blocks // SCALES)), persistent=False)
        else:
            weight = torch.empty(layer.weight.shape, dtype=torch.int8)
            self.register_buffer("SCB", torch.empty(layer.out_features), persistent=False)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Like the layer that it stands for, in the model's dtype."""
        return _ThroughQuantised.apply(x.to(self.dtype), self.weight, self.out_features, self.bias).to(
            x.dtype
        )


class _ThroughQuantised(torch.autograd.Function):
    """What a product with a quantised weight makes.

    NF4 is expanded in both passes, int8 in the backward pass alone.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, width: int, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.shape = weight, (width, x.shape[-1])
        if weight.dtype == torch.uint8:
            dense = x.new_empty(ctx.shape)
            with torch.autocast(x.device.type, enabled=False):
                return nn.functional.linear(x, dense, bias)
        # bitsandbytes keeps the input as it came, and makes a half-precision and an 8-bit copy of it for the
        # product, which its kernels for any CPU form in fp32, whole numbers next, and scale; those for GPUs
        # and newer CPUs make less of it.
        ctx.kept = x
        half, codes = x.to(torch.float16), torch.empty_like(x, dtype=torch.int8)  # noqa: F841  held while it is measured
        with torch.autocast(x.device.type, enabled=False):
            product = (codes.float() @ weight.float().t()).to(torch.int32)
            scales = torch.empty(*x.shape[:-1], 1, device=x.device) * torch.empty(width, device=x.device)
            return (product * scales * 1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dense = grad.new_empty(ctx.shape)
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ dense, None, None, None
