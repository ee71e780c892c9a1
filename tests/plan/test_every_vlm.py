"""A plan goes through every stage of a run, whatever type of model it is."""

import copy

import pytest

from llava_keeplora.config import ModelConfig, parse_config
from llava_keeplora.models import open_model
from llava_keeplora.plan import make_plan
from small_vlms import SMALL_VLMS

PART = {"rank": 2, "alpha": 2, "energy_weight": 0.5, "energy_feature": 0.9}


#: Planned in every suite; the others behind the slow marker.
QUICK = ("qwen3_vl",)


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
