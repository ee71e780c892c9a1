"""A plan goes through every stage of a run, whatever type of model it is."""

import copy

import pytest
import torch
from PIL import Image

from llava_keeplora.config import ModelConfig, parse_config
from llava_keeplora.models import open_model
from llava_keeplora.models.workload import ANSWER
from llava_keeplora.plan import make_plan
from llava_keeplora_eval.chat import image_inputs
from small_vlms import SMALL_VLMS

PART = {"rank": 2, "alpha": 2, "energy_weight": 0.5, "energy_feature": 0.9}


#: Planned in every suite; the others behind the slow marker.
QUICK = ("idefics3",)


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in SMALL_VLMS]
)
def test_a_plan_of_every_type_has_every_stage(kind, small_vlm, llava_tree, mixed_tasks):
    parts = dict.fromkeys(open_model(ModelConfig(str(small_vlm(kind)))).targets, PART)
    plan = make_plan(
        parse_config(
            {
                **llava_tree(
                    "unset", tasks=[str(mixed_tasks[0])], model={"name_or_path": str(small_vlm(kind))}
                ),
                "parts": copy.deepcopy(parts),
            }
        )
    )
    sizes = {stage.stage: stage.device for stage in plan.methods[0].stages}
    weights = (small_vlm(kind) / "model.safetensors").stat().st_size
    assert {"load", "basis", "gradient", "train", "features", "evaluate"} <= set(sizes)
    assert all(size >= 0.9 * weights for size in sizes.values()), sizes


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in SMALL_VLMS if k != "llava"]
)
def test_where_the_data_are_not_there_an_image_of_a_usual_size_is_assumed(kind, small_vlm):
    family = open_model(ModelConfig(str(small_vlm(kind))))
    family.skeleton(torch.float32)
    example, question = family._assumed()
    expected = image_inputs(family.processor, [Image.new("RGB", (640, 480))])
    assert {key: value.shape for key, value in example.items() if key in expected} == {
        key: value.shape for key, value in expected.items()
    }
    assert int((example["labels"] >= 0).sum()) >= ANSWER
    assert 96 <= question["input_ids"].shape[1] < example["input_ids"].shape[1] <= family.max_length
    assert question.keys() == example.keys() - {"labels", "image_rows"}
