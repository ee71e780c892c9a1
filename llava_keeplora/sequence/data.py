"""The tasks' data as the driver sees it: decoded once, batched by index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_keeplora.models import Inputs
from llava_keeplora.sequence.base_cache import BaseCache
from llava_keeplora.versions import decoder_versions
from llava_keeplora_recipes import Example, TaskData


class ImageCache:
    """Preprocessed images of all splits: kept in memory while they fit, made again where they don't.

    Args:
        prepare: examples → what the model takes for the images of each.
        budget_gb: memory for all splits together.
        shared: where runs find what others prepared; what fits in memory is kept there.
    """

    def __init__(
        self,
        prepare: Callable[[Sequence[Example]], list[dict[str, Tensor]]],
        budget_gb: float,
        shared: BaseCache | None = None,
    ):
        self._prepare, self.shared = prepare, shared or BaseCache(None, {})
        self._left = budget_gb * 1e9
        self._splits: dict[str, SplitImages] = {}

    def split(self, data: TaskData) -> "SplitImages":
        """The images of a split."""
        images = SplitImages(self, data)
        return self._splits.setdefault(images.order, images)

    def make(self, data: TaskData, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Decode and preprocess."""
        return self._prepare([data[i] for i in indices])

    def claim(self, size: int) -> bool:
        """Whether there is room for so many bytes more; takes it if so."""
        if size > self._left:
            return False
        self._left -= size
        return True


class SplitImages:
    """One split's images in a cache; see `llava_keeplora.models.Images`.

    Args:
        cache: where they are kept.
        data: the split.
    """

    def __init__(self, cache: ImageCache, data: TaskData):
        self._cache, self._data = cache, data
        self._rows = {example_id: i for i, example_id in enumerate(data.ids)}
        #: Of the data in this order: a fingerprint is the same in any, and pictures are found by their place.
        self.order = hashlib.sha256("\n".join([data.fingerprint, *data.ids]).encode()).hexdigest()
        self._kept: list[dict[str, Tensor]] | None = None
        self._tried = False

    def take(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """What the model takes for the images of some examples."""
        if not self._tried:
            self._fill()
        return (
            [self._kept[i] for i in indices]
            if self._kept is not None
            else self._cache.make(self._data, indices)
        )

    def of(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """The same by example."""
        return self.take([self._rows[example.id] for example in examples])

    def _fill(self, chunk: int = 256) -> None:
        self._tried = True
        shared, count = self._cache.shared, len(self._data)
        what = {"stage": "PICTURES", "data": self.order, "decoders": decoder_versions()}
        first, size = None, shared.size(what)
        if size is None:
            first = self._cache.make(self._data, range(min(chunk, count)))
            size = sum(value.nbytes for item in first for value in item.values()) * count // len(first)
        if not self._cache.claim(size):
            return

        def pieces() -> Iterator[list[dict[str, Tensor]]]:
            for start in range(0, count, chunk):
                yield (
                    first
                    if first and start == 0
                    else self._cache.make(self._data, range(start, min(start + chunk, count)))
                )

        self._kept = shared.rows(what) or shared.put_rows(what, pieces())


@dataclass(frozen=True)
class Batches:
    """A split's batches in order, whole or an evenly spaced share, for a pass without shuffling.

    Args:
        inputs: the split as the model trains on it.
        batch_size: examples per batch and process.
        fraction: share of the examples, evenly spaced (20 % is the released LLaVA setting).
        rank, world: this process and how many there are; each takes every world-th example.
        device: where batches go.
    """

    inputs: Inputs
    batch_size: int
    fraction: float = 1.0
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def chosen(self) -> list[int]:
        """The examples over all processes."""
        count = max(1, round(len(self.inputs) * self.fraction))
        return [i * len(self.inputs) // count for i in range(count)]

    @property
    def weight(self) -> int:
        """What they count together in the mean loss."""
        return sum(self.inputs.weights[i] for i in self.chosen)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """Batches, and whether they count.

        A process whose examples have run out goes along with the first one, uncounted.
        """
        chosen = self.chosen
        own = chosen[self.rank :: self.world]
        longest = len(range(0, len(chosen), self.world))
        for start in range(0, longest, self.batch_size):
            indices = own[start : start + self.batch_size]
            batch = self.inputs.collate(indices or chosen[:1])
            yield {key: value.to(self.device) for key, value in batch.items()}, bool(indices)


def stage_seed(seed: int, task: int, stage: str) -> int:
    """A seed for one stage of one task, so that history and the number of processes don't leak in."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}/{stage}".encode()).digest()[:4], "big") % (2**31)
