"""Pictures and videos by Pillow beside the same by torchvision, where that is installed."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from llava_keeplora_eval.processors import load_chat_processor
from llava_keeplora_eval.video_inputs import LAYOUTS
from small_vlms import SMALL_VLMS

pytest.importorskip("torchvision")

#: Of the 255 levels of a channel, on pictures with soft edges: at one place, and on average.
LEVELS, MEAN_LEVELS = 2.01, 0.2
SIZES = ((640, 480), (120, 90), (300, 200))


def soft_picture(seed, size):
    coarse = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def compare(made, expected, std):
    assert made.keys() <= expected.keys()
    for key, value in made.items():
        other = torch.as_tensor(expected[key])
        assert value.shape == other.shape, key
        apart = (value - other).abs().float() * 255 * (std if value.is_floating_point() else 1)
        assert apart.max() <= LEVELS and apart.mean() <= MEAN_LEVELS, (key, apart.max(), apart.mean())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", SMALL_VLMS)
def test_pictures_are_those_of_torchvision(kind, size, small_vlm):
    ours = load_chat_processor(str(small_vlm(kind))).image_processor
    own = transformers.AutoImageProcessor.from_pretrained(small_vlm(kind), backend="torchvision")
    assert not type(own).__name__.endswith("Pil") and type(ours).__name__.endswith("Pil")
    images = [[soft_picture(seed, size) for seed in range(2)]]
    made, expected = (
        {k: v for k, v in p(images, return_tensors="pt").items() if isinstance(v, torch.Tensor)}
        for p in (ours, own)
    )
    compare(made, expected, min(ours.image_std))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_videos_are_those_of_torchvision(kind, size, small_vlm):
    ours = load_chat_processor(str(small_vlm(kind))).video_processor
    own = transformers.AutoVideoProcessor.from_pretrained(small_vlm(kind))
    frames = [soft_picture(seed, size) for seed in range(5)]
    made = {k: v for k, v in ours([frames]).items() if k != "video_metadata"}
    expected = own([frames], do_sample_frames=False, return_tensors="pt")
    compare(made, expected, min(ours.settings["image_std"]))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_settings_of_a_type_are_those_of_its_video_processor(kind, small_vlm, tmp_path):
    """Where a checkpoint's files name none of them."""
    own = transformers.AutoVideoProcessor.from_pretrained(small_vlm(kind))
    own = type(own)()
    for key, value in LAYOUTS[kind].defaults.items():
        held = json.loads(own.to_json_string())[key]
        assert (
            {k: v for k, v in held.items() if v} == value
            if key in ("size", "max_image_size")
            else held == value
        )
