"""The tasks' data as the driver sees it: checked at the start, decoded once, batched by index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_keeplora.config import RunConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora_recipes import Recipe, TaskData, load_recipe

#: The held-out part is the same for every seed and method, so that all are tuned on the same examples.
HOLDOUT_SEED = 0


@dataclass(frozen=True)
class Task:
    """One task of the sequence.

    Args:
        recipe: what it is.
        train: what it learns from.
        test: what it is scored on.
    """

    recipe: Recipe
    train: TaskData
    test: TaskData

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe.name

    def record(self) -> dict:
        """What every journal entry of the task carries."""
        return {
            "task": self.name,
            "version": self.recipe.version,
            "recipe_fingerprint": self.recipe.fingerprint,
            "train": {"n": len(self.train), "fingerprint": self.train.fingerprint, "dropped": list(self.train.dropped)},
            "test": {"n": len(self.test), "fingerprint": self.test.fingerprint, "dropped": list(self.test.dropped)},
        }


def load_tasks(config: RunConfig) -> list[Task]:
    """Load and check every task's data, before any weight is loaded.

    Raises:
        RecipeError: for whatever is wrong with a recipe or its data.
        ConfigError: if a task is named twice.
    """
    recipes = [load_recipe(name) for name in config.tasks]
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"task '{name}' is in the sequence {names.count(name)} times", "name each task once")
    tasks = []
    for recipe in recipes:
        train = recipe.load("train", config.data.root, config.data.on_bad_image)
        if config.data.holdout:
            train, test = train.split_holdout(config.data.holdout, HOLDOUT_SEED)
        else:
            test = recipe.load("test", config.data.root, config.data.on_bad_image)
        # The loaded recipe: some class lists come from the source itself.
        tasks.append(Task(train.recipe, train, test))
    return tasks


class PixelCache:
    """Preprocessed images by split: kept in memory while they fit, decoded again where they don't.

    Args:
        pixels: PIL images → (images, 3, height, width).
        budget_gb: memory for all splits together.
    """

    def __init__(self, pixels, budget_gb: float):
        self._pixels = pixels
        self._left = budget_gb * 1e9
        self._kept: dict[str, Tensor] = {}
        self._too_big: set[str] = set()

    def take(self, data: TaskData, indices: Sequence[int]) -> Tensor:
        """Pixel values of some examples of a split, (len(indices), 3, height, width)."""
        key = data.fingerprint
        if key not in self._kept and key not in self._too_big:
            self._fill(data)
        if key in self._kept:
            return self._kept[key][torch.as_tensor(indices)]
        return self._decode(data, indices)

    def _decode(self, data: TaskData, indices: Sequence[int]) -> Tensor:
        return self._pixels([data[i].image for i in indices])

    def _fill(self, data: TaskData, chunk: int = 256) -> None:
        first = self._decode(data, [0])
        size = first.nbytes * len(data)
        if size > self._left:
            self._too_big.add(data.fingerprint)
            return
        self._left -= size
        kept = torch.empty(len(data), *first.shape[1:], dtype=first.dtype)
        for start in range(0, len(data), chunk):
            stop = min(start + chunk, len(data))
            kept[start:stop] = self._decode(data, range(start, stop))
        self._kept[data.fingerprint] = kept


@dataclass(frozen=True)
class Batches:
    """A split's batches in order, every example or an evenly spaced share of them, for a pass without shuffling.

    Args:
        data: the split.
        cache: where pixels come from.
        batch_size: examples per batch and process.
        fraction: share of the examples, evenly spaced (20 % is the released LLaVA setting).
        rank, world: this process and how many there are; each takes every world-th example.
        device: where batches go.
    """

    data: TaskData
    cache: PixelCache
    batch_size: int
    fraction: float = 1.0
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def total(self) -> int:
        """Examples over all processes."""
        return max(1, round(len(self.data) * self.fraction))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        chosen = [i * len(self.data) // self.total for i in range(self.total)][self.rank :: self.world]
        for start in range(0, len(chosen), self.batch_size):
            yield collate(self.data, self.cache, chosen[start : start + self.batch_size], self.device)


def collate(data: TaskData, cache: PixelCache, indices: Sequence[int], device: torch.device = torch.device("cpu")) -> dict[str, Tensor]:
    """`pixel_values` and `labels` of some examples."""
    labels = torch.tensor([data.labels[i] for i in indices])
    return {"pixel_values": cache.take(data, indices).to(device), "labels": labels.to(device)}


def stage_seed(seed: int, task: int, stage: str) -> int:
    """A seed for one stage of one task, so that history and the number of processes don't leak in."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}/{stage}".encode()).digest()[:4], "big") % (2**31)
