"""Random crops of a task's training images, a function of seed, step and example alone.

So a killed training goes on with the crops that it would have made, and any number of processes makes the
same ones.

Source: Szegedy et al., "Going deeper with convolutions" (CVPR 2015), section 6; the order of draws and the
fallback are those that torchvision documents for RandomResizedCrop, with the ratio from 3/4 to 4/3 that it
has by default.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from llava_keeplora_recipes import TaskData

RATIO = (3 / 4, 4 / 3)
TRIES = 10


class RandomCrops:
    """A split's images as random crops, and the collator that names them.

    Args:
        image_processor: a CLIP image processor; it makes pixel values of what is cropped, and neither scales
        nor cuts any more.
        side: of the square that a crop is scaled to, bicubically.
        data: the split.
        scale: least and most share of an image's area.
        seed: of the task's training.
    """

    def __init__(self, image_processor, side: int, data: TaskData, scale: tuple[float, float], seed: int):
        self.image_processor, self.side, self.data = image_processor, side, data
        self.scale, self.seed = scale, seed

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`rows` and `labels`, each (batch,): which examples these are, cropped once the step is known."""
        labels = [self.data.labels[i] for i in indices]
        return {"rows": torch.tensor(list(indices)), "labels": torch.tensor(labels)}

    def crop(self, row: int, step: int) -> Image.Image:
        """Return the crop of an example that a step sees, (side, side), RGB."""
        image = self.data[row].image.convert("RGB")
        digest = hashlib.sha256(f"{self.seed}/{step}/{row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        box = random_box(image.width, image.height, self.scale, generator)
        return image.crop(box).resize((self.side, self.side), Image.Resampling.BICUBIC)

    def filled(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return a batch of `collate` with `pixel_values` (batch, 3, side, side) in the place of `rows`.

        Args:
            batch: on any device.
            step: the optimiser step that it is for, from 0.
        """
        crops = [self.crop(row, step) for row in batch["rows"].tolist()]
        made = self.image_processor(images=crops, do_resize=False, do_center_crop=False, return_tensors="pt")
        others = {key: value for key, value in batch.items() if key != "rows"}
        return others | {"pixel_values": made["pixel_values"].to(batch["labels"].device)}


def random_box(
    width: int, height: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Draw a box (left, top, right, bottom) of random area and ratio, anywhere inside an image.

    Args:
        width, height: of the image.
        scale: least and most share of its area.
        generator: what is drawn from.
    """
    low, high = (math.log(bound) for bound in RATIO)
    for _ in range(TRIES):
        share, logarithm = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        area = width * height * (scale[0] + share * (scale[1] - scale[0]))
        ratio = math.exp(low + logarithm * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (1,), generator=generator))
            left = int(torch.randint(width - w + 1, (1,), generator=generator))
            return left, top, left + w, top + h
    # No draw fits: as much of the middle as the ratio allows.
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
