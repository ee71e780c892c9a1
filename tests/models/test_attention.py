"""`model.attn_implementation`: how transformers computes attention."""

from __future__ import annotations

import pytest
import torch

from llava_keeplora.config import ModelConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.models import load_model
from llava_keeplora_eval.errors import EvalError


@pytest.mark.parametrize("model", ["tiny_clip", "tiny_llava"])
def test_every_part_of_the_model_computes_attention_as_configured(model, request):
    family = load_model(ModelConfig(str(request.getfixturevalue(model)), attn_implementation="eager"))
    found = {m.config._attn_implementation for m in family.model.modules() if hasattr(m, "k_proj")}
    assert found == {"eager"}


def test_eager_attention_gives_the_features_of_the_default(tiny_clip):
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    outputs = []
    for kind in ({}, {"attn_implementation": "eager"}):
        family = load_model(ModelConfig(str(tiny_clip), **kind))
        with torch.no_grad():
            outputs.append(family.model.vision_model(pixels).pooler_output)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_an_attention_that_transformers_does_not_know_is_refused_with_those_it_knows(tiny_clip):
    with pytest.raises(EvalError, match='attn_implementation="fast".* is not supported.*sdpa'):
        load_model(ModelConfig(str(tiny_clip), attn_implementation="fast"))


@pytest.mark.parametrize("value", [None, "", 3])
def test_an_attention_that_is_no_name_is_refused(value):
    with pytest.raises(ConfigError, match="attn_implementation must be a name"):
        ModelConfig(attn_implementation=value)
