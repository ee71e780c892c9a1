"""Targets of a part: PEFT's `all-linear`, one name, a list; patterns and paths are refused."""

import pytest

from llava_keeplora.config import ModelConfig, PartConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.methods import find_layers
from llava_keeplora.models import DTYPES, open_model


@pytest.fixture(scope="module")
def skeletons(tiny_clip, tiny_llava):
    """Name → a family without weights."""
    families = {
        "clip": open_model(ModelConfig(str(tiny_clip))),
        "llava": open_model(ModelConfig(str(tiny_llava))),
    }
    for family in families.values():
        family.skeleton(DTYPES["float32"])
    return families


@pytest.mark.parametrize("name", ["clip", "llava"])
def test_all_linear_are_those_of_peft_that_lie_in_the_part_and_can_learn(skeletons, name):
    import copy

    from peft import LoraConfig, get_peft_model

    family = skeletons[name]
    wrapped = get_peft_model(
        copy.deepcopy(family.model), LoraConfig(target_modules="all-linear"), low_cpu_mem_usage=True
    )
    everything = {
        n.removeprefix("base_model.model.").removesuffix(".lora_A")
        for n, _ in wrapped.named_modules()
        if n.endswith(".lora_A")
    }
    found = find_layers({part: PartConfig(targets="all-linear") for part in family.parts}, family)
    in_parts = {n for n in everything if any(n.startswith(prefix + ".") for prefix in family.parts.values())}
    assert (
        set(found.adapted) | set(found.unreachable) == in_parts
        and set(found.adapted) & set(found.unreachable) == set()
    )
    assert any(n.endswith(("fc1", "up_proj")) for n in found.adapted)


def test_one_name_is_a_list_of_one():
    assert PartConfig(targets="q_proj").targets == PartConfig(targets=("q_proj",)).targets == ("q_proj",)


@pytest.mark.parametrize(
    "targets",
    [
        ".*q_proj",
        r".*\.(q|v)_proj$",
        ["layers.0.q_proj"],
        ["q_proj", 3],
        "",
        ["all-linear", "q_proj"],
        "q_proj,v_proj",
    ],
)
def test_patterns_paths_and_mixtures_are_refused_with_what_to_write(targets):
    with pytest.raises(
        ConfigError, match="targets .*; (list such names, or write all-linear|write all-linear alone)"
    ):
        PartConfig(targets=targets)
