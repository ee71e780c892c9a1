"""Peak memory of PyTorch code, measured without computing it.

A model's control flow depends on integers (which tokens are images, which are answers), its memory on
floating-point tensors. So small integer and Boolean tensors stay real, and every data-dependent step goes the
way it would; floating-point tensors are fake: they have a shape, a dtype and a storage, but no memory.
Integers that would be computed from them (an argmax, a comparison) are zero.

Attention runs as PyTorch's fused CPU kernel, which like the fused CUDA ones keeps no matrix of scores. What a
kernel allocates internally is not counted.

What an operator makes of fake tensors depends on their shapes, strides and dtypes alone. A model repeats its
blocks, and a run its rows, so that it is remembered: ten times as quick as PyTorch's own cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

#: Most elements of an integer tensor that stays real. Larger ones (attention masks) decide no control flow.
LARGEST_REAL = 2**20

aten = torch.ops.aten
#: Arguments of an operator that a result is remembered by, besides tensors.
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


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

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def _run(self, func, args, kwargs):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # every second call
        key = _signature(func, args, kwargs)
        outputs = _Unknown if key is None else _MADE.get(key, _NEW)
        if outputs is not _Unknown and outputs is not _NEW:
            with torch._C._DisableTorchDispatch():
                return _again(outputs, list(_tensors((*args, *kwargs.values()))), self._mode)
        out = self._run_anew(func, args, kwargs)
        if outputs is _NEW and _signature(func, args, kwargs) == key:  # no argument has changed its shape
            try:
                _MADE[key] = _outputs(out, list(_tensors((*args, *kwargs.values()))))
            except _Unknown:
                _MADE[key] = _Unknown
        return out

    def _run_anew(self, func, args, kwargs):
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


def _signature(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what the shape of an operator's result depends on; None if on more than fake tensors' shapes."""
    parts = [func]
    try:
        for value in (*args, *kwargs.values()):
            _describe(value, parts)
    except _Unknown:
        return None
    return (*parts, *kwargs)


class _Unknown(Exception):
    """An argument by which no result can be remembered."""


def _describe(value: Any, parts: list[Any]) -> None:
    """Append what describes an argument.

    Raises:
        _Unknown: it is no fake tensor of floating point, nor plain.
    """
    if isinstance(value, FakeTensor):
        if value.constant is not None or not value.is_floating_point():
            raise _Unknown
        parts += (value.shape, value.stride(), value.storage_offset(), value.dtype)
    elif isinstance(value, (list, tuple)):
        parts.append(len(value))
        for part in value:
            _describe(part, parts)
    elif isinstance(value, PLAIN) and not isinstance(value, Tensor):
        parts += (type(value), value)
    else:
        raise _Unknown


@dataclass(frozen=True)
class _Output:
    """A tensor that an operator returned.

    Args:
        source: which of the operator's tensors has its storage; None for one of its own.
        same: whether it is that tensor itself.
        shape, stride, offset, dtype: its own.
    """

    source: int | None
    same: bool
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


def _outputs(out: Any, inputs: list[Tensor]) -> Any:
    """Return a description of what an operator made of its tensors, in the form in which it returned it.

    Raises:
        _Unknown: it can't be made again by its description alone.
    """
    # No closure that calls itself: such a cycle would keep the tensors until garbage is collected.
    if isinstance(out, (list, tuple)):
        return type(out)([_outputs(part, inputs) for part in out])
    if out is None:
        return None
    if not isinstance(out, FakeTensor) or not out.is_floating_point():
        raise _Unknown
    storage, offset = out.untyped_storage(), out.storage_offset()
    source = next((i for i, t in enumerate(inputs) if t.untyped_storage() is storage), None)
    if source is None:
        extent = 1 + sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True))
        if offset or storage.nbytes() != out.itemsize * extent * (out.numel() > 0):
            raise _Unknown
    same = source is not None and out is inputs[source]
    return _Output(source, same, out.shape, out.stride(), offset, out.dtype)


def _again(outputs: Any, inputs: list[Tensor], mode: FakeTensorMode) -> Any:
    """Return what `_outputs` describes, made of other tensors of the same shapes."""
    if isinstance(outputs, (list, tuple)):
        return type(outputs)([_again(part, inputs, mode) for part in outputs])
    if outputs is None:
        return None
    if outputs.same:
        return inputs[outputs.source]
    if outputs.source is None:
        bare = torch.empty_strided(outputs.shape, outputs.stride, dtype=outputs.dtype, device="meta")
    else:
        bare = torch.empty(0, dtype=outputs.dtype, device="meta")
        storage = inputs[outputs.source].untyped_storage()
        bare.set_(storage, outputs.offset, outputs.shape, outputs.stride)
    return FakeTensor(mode, bare, torch.device("cpu"))


#: Signature of an operator with its arguments → what it made (`_outputs`); `_Unknown` if that can't be made
#: again by its description, `_NEW` (as a default) if it is not known yet.
_MADE: dict[Any, Any] = {}
_NEW = object()


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
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _FakeMeter(mode) as meter:
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
