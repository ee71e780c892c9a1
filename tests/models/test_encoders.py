"""Models of two encoders, one after the other: what their processors and transformers' own classes say is what is computed."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from conftest import TASKS
from llava_keeplora.config import ModelConfig
from llava_keeplora.models import Prepared, load_model
from llava_keeplora.testing import check_family
from llava_keeplora_eval.models import load_clip, load_preparation
from llava_keeplora_eval.predictors import ClipPredictor
from llava_keeplora_recipes import load_recipe, load_split
from tiny_encoders import IMAGES, KINDS, PADDING, write_encoders


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


def test_a_family_passes_the_checks_of_third_parties(checkpoint, tiny_tasks):
    check_family("clip", checkpoint, tiny_tasks[0])
