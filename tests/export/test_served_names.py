"""Names of an adapter's layers as vLLM's loader reads them, by the rules of its models, for each type that it serves.

Of vllm/lora/utils.py: `base_model.model.` is cut off, then the prefix is replaced by the model's `hf_to_vllm_mapper`, and the
last component must be a linear layer of the model, those of fused layers by their own names (`packed_modules_mapping`). Facts from
vllm/model_executor/models/{llava,llava_next,qwen2_vl,qwen2_5_vl,qwen3_vl,interns1,paligemma,gemma3_mm,idefics3}.py of 0.33, whose
registry gives InternVL the class of InternS1; SmolVLM's is Idefics3's. LlavaOnevision's does not support LoRA, VipLlava has none.
"""

import re

import pytest

from llava_keeplora.config import ModelConfig
from llava_keeplora.models import load_model
from llava_keeplora.models.layouts import LAYOUTS
from small_vlms import SMALL_VLMS

#: Prefix in transformers → prefix in vLLM.
_TOWER = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
_VISUAL = {"model.language_model.": "language_model.model.", "model.visual.": "visual."}
_SAME = {"model.text_model.": "model.text_model."}
MAPPERS = {
    "llava": _TOWER,
    "llava_next": _TOWER,
    "qwen2_vl": _VISUAL,
    "qwen2_5_vl": _VISUAL,
    "qwen3_vl": _VISUAL,
    "internvl": _TOWER,
    "paligemma": _TOWER,
    "gemma3": _TOWER,
    "idefics3": _SAME,
    "smolvlm": _SAME,
}
#: Layers of vLLM's language models: qkv_proj and gate_up_proj by what they pack, o_proj, down_proj.
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IN_VLLM = ("language_model.model.layers.", "model.text_model.layers.")


def test_the_types_that_are_served_are_those_of_the_table():
    assert {kind for kind, layout in LAYOUTS.items() if layout.served} == MAPPERS.keys()


@pytest.mark.parametrize("kind", [kind for kind in SMALL_VLMS if kind in MAPPERS])
def test_the_language_models_layers_have_the_names_of_vllm(kind, small_vlm):
    family = load_model(ModelConfig(str(small_vlm(kind))))
    names = list(family.linear_layers("language", family.targets["language"]))
    mapped = [
        new + name.removeprefix(old)
        for name in names
        for old, new in MAPPERS[kind].items()
        if name.startswith(old)
    ]
    assert len(mapped) == len(names) > 0
    assert all(name.startswith(IN_VLLM) and name.rsplit(".", 1)[-1] in LAYERS for name in mapped), mapped


#: The layers of SGLang's language models by the last name in an adapter; `get_normalized_target_modules` of its
#: srt/lora/utils.py, 0.5.23.
IN_SGLANG = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "o_proj": "o_proj",
    "down_proj": "down_proj",
}


def in_sglang(name):
    """Where SGLang puts a tensor of an adapter: by the number after `layers` and the last name, whatever stands before
    (`get_layer_id` of srt/layers/utils, `get_target_module_name` of srt/lora/utils.py)."""
    number = re.search(r"layers\.(\d+)\.", name)
    return number and (int(number[1]), name.rsplit(".", 1)[-1])


@pytest.mark.parametrize("kind", SMALL_VLMS)
def test_sglang_tells_the_language_models_layers_apart(kind, small_vlm):
    family = load_model(ModelConfig(str(small_vlm(kind))))
    names = list(family.linear_layers("language", family.targets["language"]))
    places = [in_sglang(name) for name in names]
    assert None not in places and len(set(places)) == len(names)
    assert {name for _, name in places} <= IN_SGLANG.keys()


def test_sglang_takes_layers_of_a_tower_for_those_of_the_language_model(small_vlm):
    """So the card gives its commands for adapters of the language part alone."""
    family = load_model(ModelConfig(str(small_vlm("llava"))))
    places = {
        part: {in_sglang(name) for name in family.linear_layers(part, family.targets[part])}
        for part in ("vision", "language")
    }
    assert places["vision"] & places["language"]
