"""What the tiny models learn from: the `pretrain` splits as small images in memory."""

from __future__ import annotations

import platform
from importlib.metadata import version

import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_keeplora_recipes import TaskData

SIDE = 48
REAL = ["caltech101", "fashion", "bloodcells", "omniglot", "trashnet", "signdigits", "emoji"]
MIRRORED = {"caltech101", "fashion", "bloodcells", "trashnet", "signdigits", "textures", "shapes", "counting"}


def image_processor() -> CLIPImageProcessorPil:
    """Return a processor that resizes images to 48 x 48, so that nothing is cropped away."""
    return CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def small_images(data: TaskData) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """All images of a split before normalisation.

    Returns:
        uint8, N x 3 x 48 x 48, and the height and width of each file.
    """
    processor = image_processor()
    processor.do_rescale = processor.do_normalize = False
    pixels, shapes = [], []
    for image in (example.image for example in data):
        pixels.append(processor(image, return_tensors="np")["pixel_values"][0])
        shapes.append((image.height, image.width))
    return torch.from_numpy(np.stack(pixels).astype(np.uint8)), shapes


def augment(
    pixels: torch.Tensor,
    mirrored: torch.Tensor,
    moved: torch.Tensor | None = None,
    size: tuple[int, int] = (SIDE, SIDE),
) -> torch.Tensor:
    """Shift, zoom, brighten, and mirror where that keeps the label. Returns floats in -1..1.

    Args:
        pixels: uint8, N x 3 x 48 x 48.
        mirrored: which images may be mirrored.
        moved: which may be shifted and zoomed; all of them where None.
        size: height and width of what is returned.
    """
    n = len(pixels)
    frame = torch.zeros(n, 2, 3)
    flip = torch.where(mirrored & (torch.rand(n) < 0.5), -1.0, 1.0)
    zoom = 0.85 + 0.25 * torch.rand(n, 2)
    shift = 0.24 * torch.rand(n, 2) - 0.12
    if moved is not None:
        zoom = torch.where(moved[:, None], zoom, 1.0)
        shift = torch.where(moved[:, None], shift, 0.0)
    frame[:, 0, 0], frame[:, 1, 1] = flip * zoom[:, 0], zoom[:, 1]
    frame[:, :, 2] = shift
    grid = F.affine_grid(frame, [n, 3, *size], align_corners=False)
    seen = F.grid_sample(pixels.float() / 127.5 - 1, grid, padding_mode="reflection", align_corners=False)
    contrast, light = 0.8 + 0.4 * torch.rand(n, 1, 1, 1), 0.3 * torch.rand(n, 1, 1, 1) - 0.15
    return (seen * contrast + light).clamp(-1, 1)


def versions() -> dict[str, str]:
    """Return the versions of all libraries that decide the result."""
    packages = ("torch", "transformers", "tokenizers", "numpy", "pillow", "matplotlib", "scikit-learn")
    return {p: version(p) for p in packages} | {"python": platform.python_version()}
