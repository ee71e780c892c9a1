"""Fingerprints of weights, to find out on any device whether one of them has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

#: Numbers that are read at once, and modulus of their weights, a prime.
CHUNK, PRIME = 1 << 24, 1_000_003
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(tensor: Tensor) -> str:
    """Return a text that changes with a tensor's dtype, its shape, and any single bit of it.

    Two sums over the bits as whole numbers, one of them weighted by position, wrapping around in 64 bits:
    exact and the same on every device. It detects changes, not forgeries.
    """
    integers = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total = weighted = 0
    for start in range(0, integers.numel(), CHUNK):
        part = integers[start : start + CHUNK].to(torch.int64)
        places = torch.arange(start, start + part.numel(), device=part.device) % PRIME + 1
        total += int(part.sum())
        weighted += int((part * places).sum())
    text = f"{tensor.dtype} {tuple(tensor.shape)} {total % 2**64} {weighted % 2**64}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def frozen_fingerprints(model: nn.Module) -> dict[str, str]:
    """Return name → fingerprint of all that a model's state holds and that is not trained, buffers too."""
    state = model.state_dict(keep_vars=True)
    return {
        name: fingerprint(tensor)
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and not tensor.requires_grad
    }


def find_changed(model: nn.Module, before: Mapping[str, str]) -> list[str]:
    """Return the names whose tensors no longer have the fingerprint that they had."""
    state = model.state_dict(keep_vars=True)
    return [name for name, value in before.items() if name in state and fingerprint(state[name]) != value]
