"""The tasks' data as the driver sees it: images preprocessed once, batches collated by index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_keeplora.methods.shares import Share, Stretch
from llava_keeplora.models import Images, Inputs
from llava_keeplora.sequence.base_cache import BaseCache
from llava_keeplora.versions import decoder_versions
from llava_keeplora_recipes import Example, TaskData


class ImageCache:
    """Preprocessed images of all splits: kept in memory while they fit, computed anew otherwise.

    Args:
        prepare: examples → the model's image inputs for each.
        budget_gb: memory limit for all splits together, in gigabytes.
        shared: cache through which runs share preprocessed images; only those that fit in memory are stored.
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
        """Return the images of a split; the same object for the same data."""
        images = SplitImages(self, data)
        return self._splits.setdefault(images.order, images)

    def make(self, data: TaskData, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Decode and preprocess the images of some examples."""
        return self._prepare([data[i] for i in indices])

    def claim(self, size: int) -> bool:
        """Reserve a number of bytes of the memory limit; return False if fewer are left."""
        if size > self._left:
            return False
        self._left -= size
        return True


class SplitImages:
    """One split's images in a cache; see `llava_keeplora.models.Images`.

    Args:
        cache: the cache with the memory limit that all splits share.
        data: the split.
    """

    def __init__(self, cache: ImageCache, data: TaskData):
        self._cache, self._data = cache, data
        self._rows = {example_id: i for i, example_id in enumerate(data.ids)}
        #: Hash of the data in this order: a fingerprint ignores the order, but rows are looked up by index.
        self.order = hashlib.sha256("\n".join([data.fingerprint, *data.ids]).encode()).hexdigest()
        self._kept: list[dict[str, Tensor]] | None = None
        self._tried = False

    def take(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return the model's image inputs for some examples, by index."""
        if not self._tried:
            self._fill()
        return (
            [self._kept[i] for i in indices]
            if self._kept is not None
            else self._cache.make(self._data, indices)
        )

    def of(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Return the model's image inputs for some examples of the split."""
        return self.take([self._rows[example.id] for example in examples])

    def _fill(self, chunk: int = 256) -> None:
        self._tried = True
        shared, count = self._cache.shared, len(self._data)
        what = {"stage": "PICTURES", "data": self.order, "decoders": decoder_versions()}
        # Earlier versions kept a video's frames as images.
        what |= {"videos": "whole"} if any(self._data.videos) else {}
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
class SomeImages:
    """The images of some examples of a split, by their index among these; see `Images`.

    Args:
        images: of the split.
        rows: index → row in the split.
    """

    images: Images
    rows: Sequence[int]

    def take(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return the model's image inputs for some of the examples, by index."""
        return self.images.take([self.rows[i] for i in indices])

    def of(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Return the same by example."""
        return self.images.of(examples)


@dataclass(frozen=True)
class Batches:
    """The batches of a split, or of an evenly spaced fraction of it, in order and without shuffling.

    Args:
        inputs: the split as the model trains on it.
        batch_size: examples per batch and process.
        fraction: fraction of the examples, evenly spaced (0.2 is the released LLaVA setting), or a stretch of
            their random order.
        rank, world: this process's rank and the number of processes; each takes every world-th example.
        device: where batches are moved to.
    """

    inputs: Inputs
    batch_size: int
    fraction: Share = 1.0
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def chosen(self) -> list[int]:
        """Indices of the chosen examples, over all processes."""
        if isinstance(self.fraction, Stretch):
            return self.fraction.of(len(self.inputs))
        count = max(1, round(len(self.inputs) * self.fraction))
        return [i * len(self.inputs) // count for i in range(count)]

    @property
    def share(self) -> int:
        """Number of the chosen examples that this process takes."""
        return len(self.chosen[self.rank :: self.world])

    @property
    def weight(self) -> int:
        """The weight of all chosen examples together in the mean loss."""
        return sum(self.inputs.weights[i] for i in self.chosen)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """Yield (batch, whether it counts).

        All processes yield equally many batches: one whose examples have run out yields the first example
        again, marked as not counting.
        """
        chosen = self.chosen
        of_rank = chosen[self.rank :: self.world]
        longest = len(range(0, len(chosen), self.world))
        for start in range(0, longest, self.batch_size):
            indices = of_rank[start : start + self.batch_size]
            batch = self.inputs.collate(indices or chosen[:1])
            yield {key: value.to(self.device) for key, value in batch.items()}, bool(indices)


def stage_seed(seed: int, task: int, stage: str) -> int:
    """Return the seed of one stage of one task, which depends on neither history nor number of processes."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}/{stage}".encode()).digest()[:4], "big") % (2**31)
