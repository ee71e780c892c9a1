"""The CLIP predictor: transformers' own answers, prompts encoded once, and no silent truncation."""

import dataclasses

import pytest
import torch

from llava_keeplora_eval import EvalError
from llava_keeplora_eval.class_prompts import tokenize_prompts
from llava_keeplora_eval.predictors import (
    ClipPredictor,
    class_logits,
    image_features,
    text_features,
)


@pytest.fixture(scope="module")
def clip(tiny_clip):
    from llava_keeplora_eval.models import load_clip

    return load_clip(str(tiny_clip))


def test_predictions_are_the_argmax_of_transformers_own_logits(clip, data):
    model, processor = clip
    examples = [data[i] for i in range(len(data))]
    pixels = processor.image_processor(images=[e.image for e in examples], return_tensors="pt")[
        "pixel_values"
    ]
    tokens = processor.tokenizer(data.recipe.prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels
        ).logits_per_image
    predictor = ClipPredictor(model, processor, data.recipe)
    torch.testing.assert_close(predictor.logits(examples), expected)
    assert predictor.predict(examples) == [data.recipe.classes[i] for i in expected.argmax(1).tolist()]
    assert predictor.predict([]) == []


def test_test_prompts_are_averaged_as_unit_vectors_and_the_mean_made_one(clip, tiny_tasks):
    from llava_keeplora_recipes import load_recipe

    model, processor = clip
    templates = ["a photo of the {c} .", "{c} .", "a drawing of the {c} ."]
    plain = load_recipe(tiny_tasks[0])
    recipe = dataclasses.replace(plain, test_prompts=templates)
    rows = []
    for name in recipe.classes:  # Class by class, as ZSCL's evaluation does.
        tokens = processor.tokenizer(
            [t.replace("{c}", name.replace("_", " ")) for t in templates], padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            features = model.get_text_features(**tokens)
        features = getattr(features, "pooler_output", features)
        mean = (features / features.norm(dim=-1, keepdim=True)).mean(dim=0)
        rows.append(mean / mean.norm())
    one = ClipPredictor(model, processor, recipe)
    with torch.no_grad():
        torch.testing.assert_close(one.with_test_prompts().prompt_features(), torch.stack(rows))
        assert torch.equal(
            one.prompt_features(),
            ClipPredictor(model, processor, plain).with_test_prompts().prompt_features(),
        ), "none but its one prompt"


def test_features_have_unit_length_and_carry_gradients(clip, data):
    model, processor = clip
    tokens = tokenize_prompts(processor, data.recipe.prompts)
    image = image_features(model, torch.rand(2, 3, 16, 16))
    text = text_features(model, tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    class_logits(model, image, text).sum().backward()
    assert model.logit_scale.grad is not None
    assert model.text_model.embeddings.token_embedding.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_features_accept_a_model_that_returns_plain_tensors():
    class Old:
        def get_image_features(self, pixel_values):
            return pixel_values

    torch.testing.assert_close(image_features(Old(), torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))


def test_prompts_are_encoded_once_and_the_pixel_cache_replaces_the_processor(clip, data, monkeypatch):
    model, processor = clip
    calls = []
    encode = model.get_text_features
    monkeypatch.setattr(model, "get_text_features", lambda **tokens: calls.append(1) or encode(**tokens))
    stored = torch.rand(len(data), 3, 16, 16)

    def cache(examples):
        return [{"pixel_values": stored[data.ids.index(example.id)]} for example in examples]

    predictor = ClipPredictor(model, processor.tokenizer, data.recipe, images=cache)
    assert calls == []
    first = predictor.predict([data[0], data[1]])
    second = predictor.predict([data[1], data[0]])
    assert calls == [1] and second == first[::-1]


@pytest.mark.parametrize("training", [True, False])
def test_predicting_leaves_the_models_mode_and_gradients_as_they_were(clip, data, training):
    model, processor = clip
    model.train(training)
    predictor = ClipPredictor(model, processor, data.recipe)
    assert not predictor.logits([data[0]]).requires_grad
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_half_precision_model_gets_pixels_of_its_type(tiny_clip, data):
    from llava_keeplora_eval.models import load_clip

    model, processor = load_clip(str(tiny_clip))
    predictor = ClipPredictor(model.to(torch.bfloat16), processor, data.recipe)
    assert predictor.logits([data[0]]).dtype == torch.bfloat16


def test_a_prompt_that_would_be_cut_is_refused(clip):
    _, processor = clip
    with pytest.raises(EvalError) as error:
        tokenize_prompts(processor, ["a cat", "dog " * 15])
    assert str(error.value) == (
        f"the prompt '{'dog ' * 15}' has 17 tokens and the model takes 16; "
        "shorten the recipe's prompt or the class name."
    )
    with pytest.raises(EvalError, match="has 4 tokens and the model takes 3"):
        tokenize_prompts(processor.tokenizer, ["a cat"], limit=3)
    with pytest.raises(EvalError) as error:
        tokenize_prompts(processor, [])
    assert str(error.value) == (
        "there are no prompts to tokenise; give the recipe at least one class with a prompt."
    )


def test_a_recipe_without_a_prompt_per_class_is_refused(clip):
    class Uneven:
        name, classes, prompts = "pets", ["cat", "dog"], ["a cat"]

    with pytest.raises(EvalError) as error:
        ClipPredictor(*clip, Uneven)
    assert str(error.value) == "recipe 'pets' has 2 classes and 1 prompts; give one prompt per class."
