"""Models of two encoders, one after the other: what their processors and transformers' own classes say is what is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from llava_keeplora.config import ModelConfig
from llava_keeplora.deepspeed_zero import keep_scalars_whole
from llava_keeplora.errors import ConfigError
from llava_keeplora.models import Prepared, load_model, open_model
from llava_keeplora.testing import check_family
from llava_keeplora_eval.models import load_clip, load_preparation
from llava_keeplora_eval.predictors import ClipPredictor
from llava_keeplora_recipes import Example, load_recipe, load_split
from tiny_encoders import IMAGES, KINDS, PADDING, write_clipseg, write_encoders
from tiny_models import TASKS


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(kind, tmp_path_factory):
    """A small checkpoint; shared, so don't change it."""
    classes = [name for names in TASKS.values() for name in names]
    return write_encoders(tmp_path_factory.mktemp(kind) / "model", kind, classes)


@pytest.fixture(scope="module")
def data(tiny_tasks):
    return load_split(load_recipe(str(tiny_tasks[0])), "test")


@pytest.fixture(scope="module")
def plain(checkpoint, data, kind):
    """What plain transformers make of the task: the processor's inputs, and the model's output on them."""
    model = transformers.AutoModel.from_pretrained(checkpoint)
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    images = [data[i].image for i in range(len(data))]
    inputs = processor(
        images=images, text=data.recipe.prompts, return_tensors="pt", **PADDING[kind], **IMAGES.get(kind, {})
    )
    with torch.no_grad():
        return inputs, model(**inputs).logits_per_image


def test_class_prompts_are_the_processors_own(checkpoint, data, plain):
    inputs, _ = plain
    preparation = load_preparation(str(checkpoint))
    tokens = preparation.tokens(data.recipe.prompts)
    assert tokens.keys() == inputs.keys() & {"input_ids", "attention_mask", "token_type_ids"}
    assert all(torch.equal(value, inputs[key]) for key, value in tokens.items())
    (shown,) = [line for line in preparation.show(data, 0) if line.startswith("ids: ")]
    listed = []
    for run in shown.removeprefix("ids: ⟦").removesuffix("⟧").replace(" × ", "×").split():
        token, _, count = run.partition("×")
        listed += [int(token)] * int(count or 1)
    width = len(listed)
    assert listed == inputs["input_ids"][data.labels[0]][:width].tolist()
    assert not preparation.report(data, learns=True).errors


def test_class_logits_and_answers_are_those_of_plain_transformers(checkpoint, data, plain):
    _, expected = plain
    predictor = ClipPredictor(*load_clip(str(checkpoint)), data.recipe)
    examples = [data[i] for i in range(len(data))]
    torch.testing.assert_close(predictor.logits(examples), expected)
    alone = torch.cat([predictor.logits([example]) for example in examples])
    torch.testing.assert_close(alone, expected)
    best = [data.recipe.classes[i] for i in expected.argmax(dim=1)]
    assert predictor.predict(examples) == best and float(expected.std()) > 0.1


def test_the_loss_is_cross_entropy_of_these_logits(checkpoint, data, plain):
    _, expected = plain
    family = load_model(ModelConfig(str(checkpoint)))
    batch = family.inputs(data, Prepared(family, data)).collate(range(len(data)))
    out = family.task(data.recipe)(**batch)
    torch.testing.assert_close(out["logits"], expected)
    torch.testing.assert_close(out["loss"], cross_entropy(expected, torch.tensor(data.labels)))


@pytest.mark.parametrize("kind", ["siglip2"], indirect=True)
def test_images_that_keep_their_shape_are_answered_alike_alone_and_together(checkpoint, data, kind):
    """Of shapes whose patches are fewer than there is room for, which nothing but the mask tells from content."""
    generator = np.random.default_rng(0)
    shapes = [(40, 16), (16, 24), (16, 16)]
    images = [Image.fromarray(generator.integers(0, 255, (*s, 3), dtype=np.uint8)) for s in shapes]
    examples = [Example(str(i), [image], None, [""], 0) for i, image in enumerate(images)]
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    prompts = data.recipe.prompts
    inputs = processor(images=images, text=prompts, return_tensors="pt", **PADDING[kind], **IMAGES[kind])
    assert (
        not inputs["pixel_attention_mask"].all() and len({*map(tuple, inputs["spatial_shapes"].tolist())}) > 1
    )
    model = transformers.AutoModel.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        blind = model(**inputs | {"pixel_attention_mask": torch.ones_like(inputs["pixel_attention_mask"])})
    assert float((blind.logits_per_image - expected).abs().max()) > 1e-3
    predictor = ClipPredictor(*load_clip(str(checkpoint)), data.recipe)
    torch.testing.assert_close(predictor.logits(examples), expected)
    alone = torch.cat([predictor.logits([example]) for example in examples])
    torch.testing.assert_close(alone, expected)


@pytest.mark.parametrize("kind", ["siglip2"], indirect=True)
def test_what_is_read_without_being_called_stays_unquantised(checkpoint, kind):
    family = load_model(ModelConfig(str(checkpoint), quantization="nf4"))
    kinds = {
        name: type(layer) for name, layer in family.model.named_modules() if isinstance(layer, nn.Linear)
    }
    whole = {name for name, layer in kinds.items() if layer.__name__ != "Linear4bit"}
    assert whole == {
        "vision_model.embeddings.patch_embedding",
        "vision_model.head.attention.out_proj",
        "vision_model.head.mlp.fc1",
        "vision_model.head.mlp.fc2",
        "text_model.head",
    }
    family.skeleton(torch.float32)
    made = dict(family.model.named_modules())
    assert {name for name in kinds if type(made[name]).__name__ != "QuantisedLinear"} == whole


@pytest.mark.parametrize("kind", ["siglip"], indirect=True)
def test_scale_and_bias_are_whole_in_every_process(checkpoint, kind):
    """DeepSpeed would give one process alone a parameter of one number."""
    family = load_model(ModelConfig(str(checkpoint)))
    keep_scalars_whole(family.model)
    single = [name for name, p in family.model.named_parameters() if p.numel() == 1]
    assert not single and {"logit_scale", "logit_bias"} <= dict(family.model.named_buffers()).keys()


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory):
    """A model of a type that has no record, with CLIP's tokenizer and images."""
    classes = [name for names in TASKS.values() for name in names]
    return write_clipseg(tmp_path_factory.mktemp("clipseg") / "model", classes)


def test_a_type_without_a_record_runs_by_its_parts_or_is_refused_with_the_way_to_name_them(clipseg, data):
    with pytest.raises(ConfigError, match="is a 'clipseg' model, and supported are .*model.family"):
        open_model(ModelConfig(str(clipseg)))
    with pytest.raises(ConfigError, match="a clipseg, lie is not known; name them under model.parts"):
        open_model(ModelConfig(str(clipseg), family="clip"))
    wrong = {"vision": "vision_model.blocks", "text": "text_model.encoder.layers"}
    family = load_model(ModelConfig(str(clipseg), family="clip", parts=wrong))
    with pytest.raises(ConfigError, match="no linear layer below"):
        family.linear_layers("vision", family.targets["vision"])
    parts = wrong | {"vision": "vision_model.encoder.layers"}
    family = load_model(ModelConfig(str(clipseg), family="clip", parts=parts))
    layers = [n for part, t in family.targets.items() for n in family.linear_layers(part, t)]
    assert len(layers) == 2 * 2 * 6
    batch = family.inputs(data, Prepared(family, data)).collate(range(len(data)))
    tokens = family.processor.tokenizer(data.recipe.prompts, padding=True, return_tensors="pt")
    expected = family.model(**tokens, pixel_values=batch["pixel_values"]).logits_per_image
    torch.testing.assert_close(family.task(data.recipe)(**batch)["logits"], expected)


def test_a_family_passes_the_checks_of_third_parties(checkpoint, tiny_tasks):
    check_family("clip", checkpoint, tiny_tasks[0])
