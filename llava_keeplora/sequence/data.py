"""The tasks' data as the driver sees it: checked at the start, decoded once, batched by index."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_keeplora.config import RunConfig, load_recipes
from llava_keeplora.models import Inputs
from llava_keeplora.sequence.base_cache import BaseCache
from llava_keeplora.versions import decoder_versions
from llava_keeplora_eval.metrics import check_metric
from llava_keeplora_eval.plugins import task_plugins
from llava_keeplora_eval.references import check_references
from llava_keeplora_recipes import Example, Recipe, TaskData
from llava_keeplora_recipes.repeats import repeats, shared_pictures

log = logging.getLogger(__name__)


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
        """What every journal entry of the task carries; `plugins` only where there are some."""
        plugins = task_plugins(self.recipe)
        return {
            "task": self.name,
            "version": self.recipe.version,
            "recipe_fingerprint": self.recipe.fingerprint,
            "train": {"n": len(self.train), "fingerprint": self.train.fingerprint, "dropped": list(self.train.dropped)},
            "test": {"n": len(self.test), "fingerprint": self.test.fingerprint, "dropped": list(self.test.dropped)},
            **({"plugins": plugins} if plugins else {}),
        }

    def repeats(self) -> list[str]:
        """What is in its data more than once, as sentences; see `llava_keeplora_recipes.repeats`."""
        sentences = [f"{self.name}/{data.split}: {note}" for data in (self.train, self.test) for note in repeats(data)]
        if shared := shared_pictures(self.test, self.train):
            sentences.append(f"{self.name}/{self.test.split}: {shared}")
        return sentences

    def notes(self) -> list[str]:
        """What is worth a look in its data: the same, and the files that are not read."""
        files = [(data.split, data.left_out_note) for data in (self.train, self.test)]
        return [f"{self.name}/{split}: {note}" for split, note in files if note] + self.repeats()

    def decoding_note(self) -> str:
        """A clause on pictures that earlier releases decoded otherwise; empty where there are none."""
        count = len(self.train.decoding_notes) + len(self.test.decoding_notes)
        return f"; {count} of its pictures have transparency or an EXIF orientation, which earlier releases ignored" if count else ""


def load_tasks(config: RunConfig) -> list[Task]:
    """Load and check every task's data, before any weight is loaded.

    Raises:
        RecipeError: for whatever is wrong with a recipe or its data.
        ConfigError: if a task is named twice.
        EvalError: for a metric that cannot be computed here, or that no answer to the test split can meet.
    """
    tasks = []
    for recipe in load_recipes(config.tasks):
        check_metric(recipe.metric)
        train, test = config.data.splits(recipe)
        if warning := check_references(test):
            log.warning(warning)
        # The loaded recipe: some class lists come from the source itself.
        tasks.append(Task(train.recipe, train, test))
        for note in tasks[-1].repeats():
            log.warning(note)
    return tasks


class ImageCache:
    """Preprocessed images of all splits: kept in memory while they fit, made again where they don't.

    Args:
        prepare: examples → what the model takes for the images of each.
        budget_gb: memory for all splits together.
        shared: where runs find what others prepared; what fits in memory is kept there.
    """

    def __init__(self, prepare: Callable[[Sequence[Example]], list[dict[str, Tensor]]], budget_gb: float, shared: BaseCache | None = None):
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
        return [self._kept[i] for i in indices] if self._kept is not None else self._cache.make(self._data, indices)

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
                yield first if first and start == 0 else self._cache.make(self._data, range(start, min(start + chunk, count)))

        self._kept = shared.rows(what) or shared.put_rows(what, pieces())


@dataclass(frozen=True)
class Batches:
    """A split's batches in order, every example or an evenly spaced share of them, for a pass without shuffling.

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
        """Batches, and whether they count: a process whose examples have run out goes along with the first one, uncounted."""
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
