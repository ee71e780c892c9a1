"""A processor, a template or weights that do not fit their model: one sentence, never an answer read off of nothing."""

import json
import shutil

import pytest
import torch
from PIL import Image

from llava_keeplora_eval import EvalError
from llava_keeplora_eval.llava import LlavaPredictor
from llava_keeplora_eval.models import load_clip, load_llava
from llava_keeplora_eval.predictors import ClipPredictor
from llava_keeplora_eval.processors import load_chat_processor
from llava_keeplora_recipes import load_recipe, load_split


@pytest.fixture
def copied(tiny_llava, tmp_path):
    """A copy of the random LLaVA."""
    return shutil.copytree(tiny_llava, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "config.json",
            {"image_token_id": 5, "image_token_index": 5},
            "has the image token .* and its config.json 5",
        ),
        (
            "config.json",
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy default, and its config.json full",
        ),
        ("config.json", {"vision_feature_layer": 99}, "vision_feature_layer 99, and its vision encoder"),
        ("config.json", {"vision_feature_layer": [-1, -99]}, "vision_feature_layer -99"),
        ("processor_config.json", {"patch_size": 3}, "has the patch_size 3, and its config.json"),
    ],
)
def test_a_processor_that_makes_other_image_tokens_than_the_model_takes_is_refused(
    copied, name, changes, said
):
    load_chat_processor(str(copied))
    edit(copied / name, **changes)
    with pytest.raises(EvalError, match=said):
        load_chat_processor(str(copied))


@pytest.mark.parametrize(
    "template",
    [
        "{% if",
        "{{ 1 / 0 }}",
        "{{ messages.nothing.at.all }}",
        "{{ raise_exception('roles must alternate') }}",
    ],
)
def test_a_chat_template_that_fails_is_one_sentence(copied, mixed_tasks, template):
    from llava_keeplora_eval.chat import Chat

    (copied / "chat_template.jinja").write_text(template)
    chat = Chat(load_chat_processor(str(copied)))
    with pytest.raises(EvalError, match="the model's chat template fails") as caught:
        chat.prompt("what is it?", [(20, 20)])
    assert "\n" not in str(caught.value)


def first(recipe):
    data = load_split(load_recipe(recipe), "test")
    return data, [data[0], data[1]]


def test_outputs_of_a_clip_that_are_no_numbers_are_refused(tiny_clip, tiny_tasks):
    data, examples = first(str(tiny_tasks[0]))
    model, processor = load_clip(str(tiny_clip))
    torch.nn.init.constant_(model.vision_model.post_layernorm.weight, 1e38)
    with pytest.raises(
        EvalError, match=f"outputs for example '{examples[0].id}' are NaN or infinite in float32"
    ):
        ClipPredictor(model, processor, data.recipe).predict(examples)


@pytest.mark.parametrize("generation", [{}, {"num_beams": 2}, {"suppress_tokens": [3]}])
def test_outputs_of_a_llava_that_are_no_numbers_are_refused(tiny_llava, mixed_tasks, generation):
    data, examples = first(str(mixed_tasks[1]))
    model, processor = load_llava(str(tiny_llava))
    whole = LlavaPredictor(model, processor, data.recipe, 2, generation=generation)
    assert len(whole.predict(examples)) == 2
    torch.nn.init.constant_(model.model.language_model.norm.weight, float("nan"))
    with pytest.raises(EvalError, match=f"outputs for example '{examples[0].id}' are NaN or infinite"):
        whole.predict(examples)


def test_images_of_another_size_than_the_model_takes_are_one_sentence(tiny_llava, mixed_tasks):
    data, examples = first(str(mixed_tasks[1]))
    model, processor = load_llava(str(tiny_llava))

    def small(given):
        return [{"pixel_values": torch.zeros(len(example.images), 3, 8, 8)} for example in given]

    assert isinstance(examples[0].image, Image.Image)
    with pytest.raises(EvalError, match="the model cannot take what its processor makes of example"):
        LlavaPredictor(model, processor, data.recipe, 2, images=small).predict(examples)
