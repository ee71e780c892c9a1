"""Processors put together without torchvision: what transformers itself makes where it can, and what files lack."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from llava_keeplora_eval.chat import Chat
from llava_keeplora_eval.chat_text import render
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.processors import load_chat_processor

#: Types whose processor transformers can build without torchvision.
WHOLE = ("llava", "llava_interleave", "llava_next", "gemma3", "paligemma", "idefics3")
PICTURES = [Image.new("RGB", size, colour) for size, colour in (((30, 50), "red"), ((64, 20), "blue"))]


def inputs(processor, text):
    made = processor(text=[text], images=[PICTURES], return_tensors="pt")
    return {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_processor_gives_what_transformers_own_gives(kind, small_vlm):
    ours = load_chat_processor(str(small_vlm(kind)))
    own, text = AutoProcessor.from_pretrained(small_vlm(kind)), render(ours, "What is it?", 2)
    made, expected = inputs(ours, text), inputs(own, text)
    assert made.keys() == expected.keys()
    for key, value in made.items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("llava", ["patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"]),
        ("llava_next", ["patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"]),
        ("llava_onevision", ["num_image_tokens", "vision_feature_select_strategy", "vision_aspect_ratio"]),
        ("internvl", ["image_seq_length"]),
        ("idefics3", ["image_seq_len"]),
        ("smolvlm", ["image_seq_len"]),
        ("pixtral", ["patch_size"]),
    ],
)
def test_settings_that_the_files_lack_are_the_models(kind, keys, small_vlm, tmp_path):
    whole = load_chat_processor(str(small_vlm(kind)))
    folder = shutil.copytree(small_vlm(kind), tmp_path / "model")
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    assert set(keys) <= settings.keys()
    path.write_text(json.dumps({key: value for key, value in settings.items() if key not in keys}))
    lacking, text = load_chat_processor(str(folder)), render(whole, "What is it?", 2)
    made, expected = inputs(lacking, text), inputs(whole, text)
    for key, value in expected.items():
        assert torch.equal(made[key], value), key


def test_the_limit_of_tiles_of_an_onevision_checkpoint_is_kept(small_vlm, tmp_path):
    folder = shutil.copytree(small_vlm("llava_onevision"), tmp_path / "model")
    size, lengths = (90, 90), {}
    for limit in (1, 9):
        for name in ("processor_config.json", "config.json"):
            path = folder / name
            settings = json.loads(path.read_text()) | {"vision_aspect_ratio": f"anyres_max_{limit}"}
            path.write_text(json.dumps(settings))
        lengths[limit] = len(Chat(load_chat_processor(str(folder))).prompt("What?", [size]))
    assert lengths[1] < lengths[9]


def test_a_type_without_a_template_of_its_own_is_refused_where_the_checkpoint_has_none(small_vlm, tmp_path):
    folder = shutil.copytree(small_vlm("qwen2_vl"), tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(EvalError, match="has no chat template.*chat_template.jinja"):
        load_chat_processor(str(folder))


def test_a_processor_class_that_is_not_known_is_refused(small_vlm, tmp_path):
    folder = shutil.copytree(small_vlm("llava"), tmp_path / "model")
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"processor_class": "NoProcessor"}))
    with pytest.raises(EvalError, match="processor class 'NoProcessor'"):
        load_chat_processor(str(folder))
