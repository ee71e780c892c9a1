"""Random crops of training images: their sizes and places, their pixels, and that they depend on seed, step and example alone."""

import numpy as np
import pytest
import torch

from llava_keeplora.config import ModelConfig, load_config, parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.models import RandomCrops, load_model
from llava_keeplora.models.crops import random_box
from llava_keeplora.saved_run import run_identity
from llava_keeplora_recipes import load_recipe, load_split

SCALE = (0.9, 1.0)


def boxes(width, height, scale=SCALE, count=400):
    generator = torch.Generator().manual_seed(0)
    return [random_box(width, height, scale, generator) for _ in range(count)]


@pytest.mark.parametrize("size", [(200, 200), (240, 200), (130, 160)])
def test_a_box_has_the_share_and_the_ratio_asked_for_and_lies_inside(size):
    width, height = size
    found = boxes(width, height)
    assert len(set(found)) > 100
    for left, top, right, bottom in found:
        w, h = right - left, bottom - top
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert 3 / 4 * 0.98 < w / h < 4 / 3 * 1.02
    drawn = [box for box in found if (box[2] - box[0]) * (box[3] - box[1]) > 0.89 * width * height]
    assert len(drawn) > 0.2 * len(found)


def test_small_shares_are_uniform_in_area_and_even_in_place():
    found = boxes(1000, 1000, (0.1, 0.3), 2000)
    areas = np.array([(r - l) * (b - t) / 1e6 for l, t, r, b in found])
    assert (
        abs(areas.mean() - 0.2) < 0.005
        and abs(areas.std() - 0.2 / 12**0.5) < 0.003
        and areas.min() > 0.098
        and areas.max() < 0.302
    )
    logs = np.log([(r - l) / (b - t) for l, t, r, b in found])
    assert abs(logs.mean()) < 0.02 and abs(logs.std() - 2 * np.log(4 / 3) / 12**0.5) < 0.01
    slack = np.array([[l / (1000 - (r - l)), t / (1000 - (b - t))] for l, t, r, b in found])
    assert (abs(slack.mean(0) - 0.5) < 0.03).all()


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 100), (433, 0, 566, 100)), ((100, 1000), (0, 433, 100, 566))]
)
def test_where_no_draw_fits_the_middle_is_taken_at_the_nearest_ratio(size, box):
    assert set(boxes(*size)) == {box}


@pytest.fixture(scope="module")
def crops(tiny_clip, tiny_tasks):
    family = load_model(ModelConfig(str(tiny_clip)))
    return family.crops(load_split(load_recipe(str(tiny_tasks[0])), "train"), SCALE, 7)


def test_pixels_are_those_of_the_crop_scaled_bicubically_and_normalised(crops):
    batch = crops.collate([3, 0])
    filled = crops.filled(batch, step=5)
    assert filled.keys() == {"labels", "pixel_values"} and filled["labels"].tolist() == [
        crops.data.labels[3],
        crops.data.labels[0],
    ]
    processor = crops.image_processor
    for row, pixels in zip((3, 0), filled["pixel_values"]):
        array = np.asarray(crops.crop(row, 5), dtype=np.float32) / 255
        expected = (array - np.array(processor.image_mean)) / np.array(processor.image_std)
        np.testing.assert_allclose(pixels.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_a_crop_depends_on_seed_step_and_example_alone(crops):
    again = RandomCrops(crops.image_processor, crops.side, crops.data, SCALE, 7)
    other = RandomCrops(crops.image_processor, crops.side, crops.data, SCALE, 8)
    whole = crops.filled(crops.collate([0, 1, 2]), 4)["pixel_values"]
    torch.rand(3)
    assert torch.equal(again.filled(again.collate([2]), 4)["pixel_values"][0], whole[2]), (
        "whatever was drawn before, in any batch"
    )
    assert any(other.crop(i, 4).tobytes() != crops.crop(i, 4).tobytes() for i in range(8))
    assert any(crops.crop(i, 5).tobytes() != crops.crop(i, 4).tobytes() for i in range(8))


def test_it_is_off_but_for_zscl_and_moe_adapters_and_part_of_what_a_run_is(run_tree, tmp_path):
    for name in ("mtil-order1", "mtil-order2"):
        cropped = {label for label, method in load_config(name).methods.items() if method.random_resized_crop}
        assert cropped == {"zscl", "moe-adapters"}
    tree = run_tree(
        tmp_path / "run",
        methods={"cropped": {"method": "seq-lora", "random_resized_crop": [0.9, 1]}, "seq-lora": {}},
    )
    methods = run_identity(parse_config(tree))["methods"]
    assert (
        methods["cropped"]["random_resized_crop"] == [0.9, 1]
        and "random_resized_crop" not in methods["seq-lora"]
    )


@pytest.mark.parametrize("scale", [[0.9], [0.0, 1.0], [1.0, 0.9], [0.9, 1.1], ["a", "b"]])
def test_shares_that_cannot_be_meant_are_refused(run_tree, tmp_path, scale):
    with pytest.raises(ConfigError, match="methods.seq-lora.random_resized_crop"):
        parse_config(run_tree(tmp_path / "run", methods={"seq-lora": {"random_resized_crop": scale}}))
