"""Hooks on linear layers that capture their inputs (features) and output gradients.

Legend: n tokens, in / out features of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class _OutputHook(torch.autograd.Function):
    """The identity on a layer's output, which passes (x, dY) to a callback in the backward pass.

    The input is saved through autograd, so that activation checkpointing can still free it. `anchor` is a
    scalar that requires a gradient: without it, the backward pass would never reach the first adapted layer
    of a frozen model, whose input requires none.
    """

    @staticmethod
    def forward(
        ctx, output: Tensor, x: Tensor, anchor: Tensor, callback: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.callback = callback
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        (x,) = ctx.saved_tensors
        ctx.callback(x, grad_output)
        return (grad_output if ctx.needs_input_grad[0] else None), None, None, None


@contextmanager
def gradient_hooks(
    layers: Mapping[str, nn.Linear], callback: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Pass each layer's input x (..., in) and dY (..., out) to `callback(name, x, dy)` in backward passes."""

    def hook(name: str, anchor: Tensor):
        def receive(x: Tensor, dy: Tensor) -> None:
            # Under autocast the products would be rounded to half precision before they are summed.
            with torch.autocast(x.device.type, enabled=False):
                callback(name, x, dy)

        def forward_hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return _OutputHook.apply(output, args[0], anchor, receive) if torch.is_grad_enabled() else output

        return forward_hook

    handles = []
    try:
        for name, layer in layers.items():
            handles.append(
                layer.register_forward_hook(
                    hook(name, torch.zeros((), device=layer.weight.device, requires_grad=True))
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def shared_inputs(layers: Mapping[str, nn.Linear], run: Callable[[], object]) -> dict[str, str]:
    """Find which layers read the very same tensor, by one forward pass.

    Args:
        layers: name → linear layer.
        run: runs the model once on any input.

    Returns:
        layer name → the name of the first layer that reads the same input (itself if no other does). Layers
        that the forward pass does not reach are missing.
    """
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, name=name: inputs.__setitem__(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    leaders: dict[int, str] = {}
    return {name: leaders.setdefault(id(x), name) for name, x in inputs.items()}


@contextmanager
def feature_hooks(layers: Mapping[str, nn.Linear], callback: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Pass the input (..., in) of each layer to `callback(name, x)` while the block runs."""

    def hook(name: str, x: Tensor) -> None:
        # Under autocast the statistics would be summed in half precision.
        with torch.autocast(x.device.type, enabled=False):
            callback(name, x.detach())

    handles = [
        layer.register_forward_pre_hook(lambda m, args, name=name: hook(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
