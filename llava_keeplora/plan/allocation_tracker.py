"""The peak memory of code that never computes.

Fake tensors for what is floating point, real ones for small whole numbers.

A model's control flow hangs on whole numbers (which tokens are images, which are answers), its memory on
floating point. So small integer and Boolean tensors stay real and every data-dependent step goes the way it
would; floating-point tensors have a shape, a dtype and a storage, but no memory. Whole numbers that would be
computed from them (an argmax, a comparison) are zero.

Attention takes the road of PyTorch's fused CPU kernel, which like the fused CUDA ones keeps no matrix of
scores. What a kernel allocates inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

#: Larger integer tensors (attention masks) decide nothing; they are shapes like the rest.
LARGEST_REAL = 2**20

aten = torch.ops.aten


class Meter(TorchDispatchMode):
    """Count the bytes of every storage made in the block while it is alive, and remember the peak.

    Attributes:
        live: bytes alive now.
        peak: the most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[weakref.ref, int] = {}

    def hold(self, tensors: Any) -> None:
        """Count what was made before: the storages of all tensors of a tree, each once."""
        for tensor in _tensors(tensors):
            storage = tensor.untyped_storage()
            key = weakref.ref(storage, self._freed)
            if key not in self._seen:
                self._seen[key] = storage.nbytes()
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _freed(self, key: weakref.ref) -> None:
        self.live -= self._seen.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self._run(func, args, kwargs or {})
        self.hold(out)
        return out

    def _run(self, func, args, kwargs):
        return func(*args, **kwargs)


class _FakeMeter(Meter):
    """A meter over a `FakeTensorMode`, with small whole numbers real; see the module's docstring."""

    def _run(self, func, args, kwargs):
        inputs = list(_tensors((*args, *kwargs.values())))
        given = not any(isinstance(t, FakeTensor) or not _is_small_whole(t) for t in inputs)
        if given and inputs and _depends_on_values(func):
            return _really(func, args, kwargs)
        if func is aten._local_scalar_dense.default:
            return 0
        if func in (aten.index.Tensor, aten.masked_select.default):
            func, args = (
                aten.index.Tensor,
                (args[0], self._positions([args[1]] if isinstance(args[1], Tensor) else args[1])),
            )
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and not _is_small_whole(out):
            return out
        if given and all(map(_is_small_whole, _tensors(out))):
            return _really(func, args, kwargs)
        own = {id(t) for t in inputs}
        return tree_map_only(
            Tensor, lambda t: _zeros(t) if id(t) not in own and _is_small_whole(t) else t, out
        )

    def _positions(self, index):
        """Masks as positions, which is what the kernel makes of them and what takes the memory."""
        found = []
        for one in index:
            if one is None or one.dtype != torch.bool:
                found.append(one)
                continue
            with unset_fake_temporarily():
                count = one.numel() if isinstance(one, FakeTensor) else int(one.sum())
            found += [torch.empty(count, dtype=torch.int64) for _ in range(one.dim())]
        self.hold(found)
        return found


def _tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors of nested lists and tuples.

    Twenty times as quick as a tree of any kind, and there are ten thousands.
    """
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for one in tree:
            yield from _tensors(one)


def _is_small_whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= LARGEST_REAL


def _depends_on_values(func) -> bool:
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _really(func, args, kwargs):
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _zeros(like: Tensor) -> Tensor:
    with unset_fake_temporarily():
        return torch.zeros(like.shape, dtype=like.dtype)


@contextmanager
def metered() -> Iterator[Meter]:
    """Measure what the block would take; tensors made inside are fake, as the module's docstring says.

    Everything floating point must be made inside the block.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _FakeMeter() as meter:
        yield meter


@contextmanager
def faked(model: nn.Module) -> Iterator[None]:
    """Inside `metered`.

    Give a model on the meta device fake weights on the CPU for the length of the block.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:  # Weights that are shared stay so.
            zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
            made[id(tensor)] = (
                nn.Parameter(zeros, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros
            )
        return made[id(tensor)]

    places = [
        (holder, dict(holder))
        for module in model.modules()
        for holder in (module._parameters, module._buffers)
    ]
    for holder, kept in places:
        holder.update({name: fake(tensor) for name, tensor in kept.items() if tensor is not None})
    try:
        yield
    finally:
        for holder, kept in places:
            holder.update(kept)
