"""The CLIP family: layers by part, and a task's loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from llava_keeplora.config import ModelConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.models import ClipTask, embedded_models, load_model
from llava_keeplora.sequence.data import ImageCache
from llava_keeplora_recipes import load_recipe, load_split


@pytest.fixture
def family(tiny_clip):
    return load_model(ModelConfig(str(tiny_clip)))


def pixels(family, examples):
    return torch.stack([image["pixel_values"] for image in family.prepare(examples)])


def test_layers_are_named_by_part_and_leaf(family):
    layers = family.linear_layers("text", ("q_proj", "fc1"))
    assert sorted(layers) == [
        f"text_model.encoder.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("mlp.fc1", "self_attn.q_proj")
    ]


def test_a_target_that_matches_nothing_is_refused_with_the_nearest_name(family):
    with pytest.raises(
        ConfigError,
        match=r"parts.vision.targets names 'q_projj', which matches no linear layer of that part; did you mean 'q_proj'",
    ):
        family.linear_layers("vision", ("q_projj",))


def test_a_part_that_the_model_does_not_have_is_refused(family):
    with pytest.raises(
        ConfigError,
        match="parts names 'language', which this model does not have; valid names are text, vision",
    ):
        family.linear_layers("language", ("q_proj",))


def test_a_model_that_is_not_there_is_refused_with_the_embedded_names(tmp_path):
    with pytest.raises(ConfigError, match="there is no model 'tiny-clop'.*; did you mean 'tiny-clip'"):
        load_model(ModelConfig("tiny-clop"))
    with pytest.raises(
        ConfigError, match="there is no folder '.*nothing' .*; give a folder with a checkpoint, or a Hub id"
    ):
        load_model(ModelConfig(str(tmp_path / "nothing")))


def test_the_loss_is_cross_entropy_over_the_class_prompts_and_the_same_inside_a_constants_scope(
    family, tiny_tasks
):
    data = load_split(load_recipe(str(tiny_tasks[0])), "test")
    task = family.task(data.recipe)
    batch = {
        "pixel_values": pixels(family, [data[i] for i in range(4)]),
        "labels": torch.tensor(data.labels[:4]),
    }

    tokens = family.processor.tokenizer(data.recipe.prompts, padding=True, return_tensors="pt")
    logits = family.model(**tokens, pixel_values=batch["pixel_values"]).logits_per_image
    out = task(**batch)
    with task.constants():
        inside = task(**batch)

    torch.testing.assert_close(out["logits"], logits)
    torch.testing.assert_close(out["loss"], cross_entropy(logits, batch["labels"]))
    torch.testing.assert_close(inside["loss"], out["loss"])


def test_prompts_at_every_position_are_filled_with_zeros_whatever_the_tokenizer_pads_with_and_answer_the_same(
    family, tiny_tasks
):
    data = load_split(load_recipe(str(tiny_tasks[0])), "test")
    task = family.task(data.recipe)
    width, lengths = family.config.text_config.max_position_embeddings, task.attention_mask.sum(1).tolist()
    other = torch.where(task.attention_mask.bool(), task.input_ids, 7)
    padded = ClipTask(task.model, task.prompts | {"input_ids": other})
    for every in (task.at_every_position(), padded.at_every_position()):
        assert every.input_ids.shape == (len(data.recipe.classes), width)
        for row, length in zip(range(len(lengths)), lengths):
            assert (
                torch.equal(every.input_ids[row, :length], task.input_ids[row, :length])
                and not every.input_ids[row, length:].any()
            )
        assert (
            bool(every.token_mask("text", {}).all())
            and every.token_mask("text", {}).shape == every.input_ids.shape
        )
        torch.testing.assert_close(every.text(), task.text())


def test_what_is_scored_is_what_is_trained(family, tiny_tasks):
    data = load_split(load_recipe(str(tiny_tasks[0])), "test")
    examples = [data[i] for i in range(len(data))]
    with torch.no_grad():
        out = family.task(data.recipe)(
            pixel_values=pixels(family, examples), labels=torch.tensor(data.labels)
        )
    best = [data.recipe.classes[i] for i in out["logits"].argmax(dim=1)]
    images = ImageCache(family.prepare, budget_gb=1.0).split(data)
    assert family.predictor(data.recipe, images).predict(examples) == best


def test_the_embedded_model_loads_by_name_and_is_small():
    assert "tiny-clip" in embedded_models()
    family = load_model(ModelConfig("tiny-clip"))
    assert sum(p.numel() * 4 for p in family.model.parameters()) < 10e6
