"""The embedded LLaVA: an ordinary checkpoint that answers, and a record of how it was made."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel, LlavaForConditionalGeneration

from llava_keeplora.models import ASSETS
from llava_keeplora_recipes import load_recipe, load_split

FOLDER = ASSETS / "tiny-llava"
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def model():
    return LlavaForConditionalGeneration.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def scripts():
    """The pre-training's own modules, found as its script finds them."""
    sys.path.insert(0, str(SCRIPTS))
    yield SimpleNamespace(
        **{name: importlib.import_module(f"pretraining.{name}") for name in ("lessons", "training", "turns")}
    )
    sys.path.remove(str(SCRIPTS))


def chat(processor, question: str, images: int = 1) -> str:
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_it_is_small_and_needs_no_torchvision(model, processor):
    assert (FOLDER / "model.safetensors").stat().st_size < 25e6
    assert type(processor.image_processor).__name__.endswith("Pil")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_chat_text_has_the_images_first_and_works_without_any(processor):
    assert chat(processor, "What?") == "USER: <image>\nWhat? ASSISTANT:"
    assert chat(processor, "What?", images=2) == "USER: <image>\n<image>\nWhat? ASSISTANT:"
    assert chat(processor, "What?", images=0) == "USER: What? ASSISTANT:"


def test_an_image_becomes_36_tokens(model, processor):
    batch = processor(
        text=[chat(processor, "What?")], images=[Image.new("RGB", (30, 70), "red")], return_tensors="pt"
    )
    assert batch["pixel_values"].shape == (1, 3, 48, 48)
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 36 == model.config.image_seq_length


@pytest.mark.parametrize(
    "text", ["yes", "a red circle left of a blue square.", "Åland’s 3rd flag, 東京 — (blue)"]
)
def test_tokens_of_prompt_and_answer_are_those_of_the_whole_text(processor, text):
    prompt, answer = chat(processor, "What is this?"), f" {text}</s>"
    tokens = processor.tokenizer
    assert tokens(prompt + answer).input_ids == tokens(prompt).input_ids + tokens(answer).input_ids
    assert tokens.decode(tokens(answer).input_ids, skip_special_tokens=True) == f" {text}"


def test_the_image_encoder_has_the_shape_of_tiny_clips(model):
    clip = CLIPModel.from_pretrained(ASSETS / "tiny-clip").vision_model
    ours = {name: tensor.shape for name, tensor in model.model.vision_tower.state_dict().items()}
    theirs = {name.removeprefix("vision_model."): tensor.shape for name, tensor in clip.state_dict().items()}
    assert ours == theirs


def exact_matches(model, processor, task: str, count: int) -> float:
    """Share of greedy answers that are right, by the models' own generate."""
    data = load_split(load_recipe(task), "test").take(range(count))
    texts = [chat(processor, question) for question in data.questions]
    batch = processor(text=texts, images=[e.image for e in data], padding=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=8, do_sample=False)
    said = processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return float(np.mean([text.strip() in right for text, right in zip(said, data.answers, strict=True)]))


@pytest.mark.parametrize("task", ["scene-colour", "scene-relation"])
def test_it_answers_as_well_as_its_record_says_and_better_than_a_guess(model, processor, task):
    row = json.loads((FOLDER / "pretrain.json").read_text())["zero_shot_test"][task]
    score = exact_matches(model, processor, task, 120)
    assert score > row["guess"] + 0.1
    assert abs(score - row["score"]) < 0.15


def test_its_record_names_what_it_has_seen(model):
    record = json.loads((FOLDER / "pretrain.json").read_text())
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert set(record["pretrain_sets"]) == set(record["shares"]) == set(record["zero_shot_test"])
    for name in record["pretrain_sets"]:
        assert "tiny-llava" in load_recipe(name).seen_by


def test_the_digits_that_it_has_seen_are_drawn_and_asked_again_alike(scripts, tmp_path):
    record = json.loads((FOLDER / "pretrain.json").read_text())["pretrain_sets"]["digits"]
    again = scripts.turns.taught_set("digits", tmp_path)
    assert (len(again.turns), again.fingerprint()) == (record["images"], record["sha256"])


def test_turns_that_share_an_image_are_learned_as_if_each_were_asked_alone(model, processor, scripts):
    turns = [
        ("Is there a red square?", "yes"),
        ("What color is the star?", "blue"),
        ("List the things.", "red square, blue star"),
    ]
    pixels = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    lessons = scripts.lessons.Lessons(
        [scripts.turns.TaughtSet("scene-exists", pixels, [turns], [(48, 48)])], processor.tokenizer, 1, 0
    )
    seen = pixels.float() / 127.5 - 1
    model.set_attn_implementation("eager")  # the packed mask is one that is added
    together = lessons.pack([0], [lessons.turns[0]])
    alone = [lessons.pack([0], [[turn]]) for turn in lessons.turns[0]]
    with torch.no_grad():
        packed, _ = scripts.training.answer_losses(model, together | {"pixel_values": seen}, bf16=False)
        parts = [
            scripts.training.answer_losses(model, one | {"pixel_values": seen}, bf16=False)[0]
            for one in alone
        ]
        plain = [_losses(model, processor, seen, *turn) for turn in turns]
    torch.testing.assert_close(packed, torch.cat(parts), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed, torch.cat(plain), rtol=1e-4, atol=1e-4)


def _losses(model, processor, seen: torch.Tensor, question: str, answer: str) -> torch.Tensor:
    """The loss of every token of one answer as the processor writes it, with nothing of the packing."""
    prompt = processor(
        text=[chat(processor, question)], images=[Image.new("RGB", (48, 48))], return_tensors="pt"
    )["input_ids"]
    reply = processor.tokenizer(f" {answer}</s>", return_tensors="pt")["input_ids"]
    ids = torch.cat([prompt, reply], dim=1)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=seen).logits[
        :, prompt.shape[1] - 1 : -1
    ]
    return torch.nn.functional.cross_entropy(logits[0], reply[0], reduction="none")
