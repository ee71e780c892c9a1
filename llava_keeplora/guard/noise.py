"""The noise floor: how far the score of one and the same model moves with other batches or another precision.

One rule serves runs, callbacks and the command `guard`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llava_keeplora.guard.watch import chosen
from llava_keeplora_eval.paired_scores import score_change
from llava_keeplora_recipes import TaskData

#: Most examples of a recipe on which the noise is measured.
NOISE_EXAMPLES = 200


@dataclass(frozen=True)
class Variant:
    """Another way to compute the same answers.

    Args:
        name: what differs.
        batch_size: examples per forward pass.
        dtype: the precision of products; the model's when None.
    """

    name: str
    batch_size: int
    dtype: torch.dtype | None = None


def variants(batch_size: int, dtype: torch.dtype) -> list[Variant]:
    """Return the ways to answer again: batches of half the size, and products in another precision.

    Args:
        batch_size: examples per forward pass of the answers that are judged; of 1, the other size is 2.
        dtype: the model's. bfloat16 is replaced by float16, every other by bfloat16.
    """
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    return [
        Variant("batches", batch_size // 2 if batch_size > 1 else 2),
        Variant("precision", batch_size, other),
    ]


def noise_examples(data: TaskData) -> TaskData:
    """Return the examples on which the noise is measured, see `chosen`."""
    return chosen(data, NOISE_EXAMPLES)


def noise_record(
    data: TaskData, before: Mapping[str, str], again: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Return the noise of a recipe: the largest change in points, and what it is the largest of.

    Args:
        data: the examples, see `noise_examples`.
        before: id → answer, as they are judged.
        again: name of a variant → id → answer.
    """
    points = {name: abs(score_change(data, before, after)) for name, after in again.items()}
    flips = [sum(before[key] != after[key] for key in after) for after in again.values()]
    return {"points": max(points.values()), "flips": max(flips), "n": len(data), "by": points}
