"""What a model takes for images: joined into batches, and what their sizes alone decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: What a processor returns for each token; everything else that it returns is of the images.
TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def joined(inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the image inputs of several examples into a batch.

    Every key is joined along its first dimension (images, tiles or patches); where other dimensions differ,
    such as numbers of tiles, zeros fill up at their ends.
    """
    import torch
    from torch.nn.functional import pad

    batch: dict[str, Tensor] = {}
    for key in {key: None for item in inputs for key in item}:
        values = [item[key] for item in inputs if key in item]
        shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values))]
        filled = [
            pad(value, [n for has, wants in zip(value.shape[:0:-1], shape[::-1]) for n in (0, wants - has)])
            for value in values
        ]
        batch[key] = torch.cat(filled)
    return batch


class ImageShapes:
    """An image processor that makes what an image's size alone decides, once for each size.

    Token ids depend on the sizes of images only, so that lengths are known without reading a pixel.

    Args:
        image_processor: of a processor of transformers.
    """

    def __init__(self, image_processor):
        self._image_processor = image_processor
        self._made: dict[str, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_image_processor":
            raise AttributeError(name)
        return getattr(self._image_processor, name)

    def __call__(self, images, **kwargs):
        """Return the image processor's outputs with floating-point values left out, but for their shapes.

        Args:
            images: flat or nested; of several lists of equal sizes, one is looked at and the outputs repeat.
        """
        from transformers import BatchFeature

        lists = _sizes(images)
        count = len(images) if len(images) > 1 and _are_equal_lists(lists) else 1
        images, lists = (images[:1], lists[:1]) if count > 1 else (images, lists)
        key = repr((lists, sorted(kwargs.items(), key=str)))
        if key not in self._made:
            self._made[key] = {k: shape_only(v) for k, v in self._image_processor(images, **kwargs).items()}
        return BatchFeature({k: _repeated(v, count) for k, v in self._made[key].items()})


def _are_equal_lists(sizes) -> bool:
    return isinstance(sizes[0], list) and all(other == sizes[0] for other in sizes)


def _repeated(value: Any, count: int) -> Any:
    """Return a value of `ImageShapes` of several times as many images."""
    import numpy
    import torch

    if count == 1:
        return value
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            return value.new_zeros(()).expand(count * len(value), *value.shape[1:])
        return torch.cat([value] * count)
    if isinstance(value, numpy.ndarray):
        if value.dtype.kind == "f":
            return numpy.broadcast_to(numpy.zeros((), value.dtype), (count * len(value), *value.shape[1:]))
        return numpy.concatenate([value] * count)
    return list(value) * count


def _sizes(images) -> Any:
    return [_sizes(image) for image in images] if isinstance(images, (list, tuple)) else images.size


def shape_only(value: Any) -> Any:
    """Return what a processor makes with floating-point values left out, but for their shapes."""
    import numpy
    import torch

    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.new_zeros(()).expand(value.shape)
    if isinstance(value, numpy.ndarray) and value.dtype.kind == "f":
        return numpy.broadcast_to(numpy.zeros((), value.dtype), value.shape)
    return [shape_only(item) for item in value] if isinstance(value, (list, tuple)) else value


@lru_cache(maxsize=64)
def blank_image(height: int, width: int):
    """Return a black image, whose size alone matters."""
    from PIL import Image

    return Image.new("RGB", (width, height))
