"""Reference data: unlabelled images and texts, other than the tasks', that a method uses in training."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """Reference images, and texts that need not belong to them.

    Args:
        images: indices → the model's inputs for these images.
        count: number of images.
        texts: inputs of the text encoder, each (texts, tokens).
        record: what identifies the data, for the journal.
    """

    images: Callable[[Sequence[int]], list[dict[str, Tensor]]]
    count: int
    texts: Mapping[str, Tensor]
    record: Mapping[str, Any]

    def draw(self, size: int, *seed: int) -> list[int]:
        """Return the indices of at most `size` images, drawn without replacement.

        A pure function of the arguments that leaves all global random generators untouched.
        """
        return random.Random("/".join(map(str, seed))).sample(range(self.count), min(size, self.count))
