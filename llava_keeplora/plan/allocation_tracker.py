"""Peak memory of PyTorch code, measured without computing it.

A model's control flow depends on integers (which tokens are images, which are answers), its memory on
floating-point tensors. So small integer and Boolean tensors stay real, and every data-dependent step goes the
way it would; floating-point tensors are fake: they have a shape, a dtype and a storage, but no memory.
Integers that would be computed from them (an argmax, a comparison) are zero.

Attention runs as PyTorch's fused CPU kernel, which like the fused CUDA ones keeps no matrix of scores. What a
kernel allocates internally is not counted.
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

#: Most elements of an integer tensor that stays real. Larger ones (attention masks) decide no control flow.
LARGEST_REAL = 2**20

aten = torch.ops.aten


class Meter(TorchDispatchMode):
    """Counter of the bytes of all storages that are alive in a block, and of their peak.

    Attributes:
        live: bytes alive now.
        peak: the most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[weakref.ref, int] = {}

    def hold(self, tensors: Any) -> None:
        """Count the storages of all tensors of a tree (nested lists and tuples), each once."""
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
    """Meter over a `FakeTensorMode` that keeps small integer tensors real; see the module's docstring."""

    def _run(self, func, args, kwargs):
        inputs = list(_tensors((*args, *kwargs.values())))
        all_real = not any(isinstance(t, FakeTensor) or not _is_small_integer(t) for t in inputs)
        if all_real and inputs and _depends_on_values(func):
            return _run_real(func, args, kwargs)
        if func is aten._local_scalar_dense.default:
            return 0
        if func in (aten.index.Tensor, aten.masked_select.default):
            func, args = (
                aten.index.Tensor,
                (args[0], self._positions([args[1]] if isinstance(args[1], Tensor) else args[1])),
            )
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and not _is_small_integer(out):
            return out
        if all_real and all(map(_is_small_integer, _tensors(out))):
            return _run_real(func, args, kwargs)
        input_ids = {id(t) for t in inputs}
        return tree_map_only(
            Tensor, lambda t: _zeros(t) if id(t) not in input_ids and _is_small_integer(t) else t, out
        )

    def _positions(self, index):
        """Turn Boolean masks of an index into positions, as the kernel does, and count their memory."""
        positions = []
        for part in index:
            if part is None or part.dtype != torch.bool:
                positions.append(part)
                continue
            with unset_fake_temporarily():
                count = part.numel() if isinstance(part, FakeTensor) else int(part.sum())
            positions += [torch.empty(count, dtype=torch.int64) for _ in range(part.dim())]
        self.hold(positions)
        return positions


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield all tensors of nested lists and tuples.

    This is called ten thousands of times, and is twenty times as quick as PyTorch's pytree.
    """
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from _tensors(branch)


def _is_small_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= LARGEST_REAL


def _depends_on_values(func) -> bool:
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _run_real(func, args, kwargs):
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _zeros(like: Tensor) -> Tensor:
    with unset_fake_temporarily():
        return torch.zeros(like.shape, dtype=like.dtype)


@contextmanager
def metered() -> Iterator[Meter]:
    """Measure the memory that a block would take; floating-point tensors made in it are fake.

    Everything floating point must be made inside the block (see the module's docstring).
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _FakeMeter() as meter:
        yield meter


@contextmanager
def faked(model: nn.Module) -> Iterator[None]:
    """Give a model on the meta device fake CPU weights for the length of a block inside `metered`."""
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:  # Weights that are shared stay so.
            zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
            fakes[id(tensor)] = (
                nn.Parameter(zeros, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros
            )
        return fakes[id(tensor)]

    originals = [
        (holder, dict(holder))
        for module in model.modules()
        for holder in (module._parameters, module._buffers)
    ]
    for holder, tensors in originals:
        holder.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
    try:
        yield
    finally:
        for holder, tensors in originals:
            holder.update(tensors)
