"""What a task asks of the machine: how many examples, and what the largest one looks like to the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: Characters of an answer, and tokens of one, where there are no data to ask.
ANSWER = 32
#: Bytes of a line of predictions in addition to the answer: JSON keys, an id, the recipe's name, version and
#: fingerprint.
LINE = 160

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Work:
    """One task.

    Args:
        name: the task's name.
        train: examples to learn, a caption each where an image has several.
        test: examples to answer.
        images: examples of both splits together, as the image cache holds them.
        example: the longest training example as a batch of one; floating-point tensors are on the meta
            device.
        question: the longest test example as a batch of one, without its answer.
        prompts: CLIP's class prompts; nothing for other models.
        answer: characters of an answer on average.
        assumed: whether `train` and `test` are assumed, for want of data and of a published number.
    """

    name: str
    train: int
    test: int
    images: int
    example: Batch
    question: Batch
    prompts: Batch
    answer: float
    assumed: bool = False

    @property
    def tokens(self) -> int:
        """Of the longest training example, image tokens included; of the longest class prompt for CLIP."""
        ids = self.prompts["input_ids"] if self.prompts else self.example["input_ids"]
        return ids.shape[1]

    @property
    def predictions(self) -> int:
        """Bytes of the file of answers."""
        return round(self.test * (LINE + self.answer))

    @property
    def image_bytes(self) -> int:
        """Of one example's preprocessed images."""
        return self.example["pixel_values"].nbytes if "pixel_values" in self.example else 0


def repeated(batch: Batch, times: int) -> dict[str, Tensor]:
    """Repeat a batch of one example `times` times; its floating-point tensors become zeros on the device."""
    return {
        key: torch.zeros(times * len(value), *value.shape[1:])
        if value.is_floating_point()
        else torch.cat([value] * times)
        for key, value in batch.items()
    }


def on_meta(batch: Batch) -> dict[str, Tensor]:
    """Return a batch with its floating-point tensors on the meta device."""
    return {key: value.to("meta") if value.is_floating_point() else value for key, value in batch.items()}
