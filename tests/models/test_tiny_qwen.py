"""The embedded Qwen-VL: what it learns from is what processor and model make of single questions; it answers."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from llava_keeplora.models import ASSETS
from llava_keeplora_eval.models import resolve_model
from llava_keeplora_eval.processors import load_chat_processor
from llava_keeplora_recipes import load_recipe, load_split

FOLDER = ASSETS / "tiny-qwen"
SCRIPTS = Path(__file__).parents[2] / "scripts"
SHAPES = [(48, 48), (72, 96), (96, 48), (28, 28)]
TURNS = [
    ("Is there a red square?", "yes"),
    ("What color is the star?", "blue"),
    ("List the things.", "red square, blue star"),
]


@pytest.fixture(scope="module")
def scripts():
    """The pre-training's own modules, found as its script finds them."""
    sys.path.insert(0, str(SCRIPTS))
    yield SimpleNamespace(
        **{
            name: importlib.import_module(f"pretraining.{name}")
            for name in ("distil", "qwen", "training", "turns")
        }
    )
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def untrained(scripts, tmp_path_factory):
    """Return the recipe's model before its first step, its processor as loaded here, and its lessons."""
    pixels = torch.zeros(len(SHAPES), 3, 48, 48, dtype=torch.uint8)
    sets = [scripts.turns.TaughtSet("scene-exists", pixels, [TURNS] * len(SHAPES), SHAPES)]
    tokenizer = scripts.qwen.train_tokenizer(sets, 320)
    torch.manual_seed(0)
    model = scripts.qwen.build_model(tokenizer).eval()
    with torch.no_grad():  # new weights answer everything nearly alike
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() == 2 else 1.0)
    folder = tmp_path_factory.mktemp("tiny-qwen")
    model.config.save_pretrained(folder)
    scripts.qwen.save_processor(tokenizer, folder)
    return model, load_chat_processor(str(folder)), scripts.qwen.QwenLessons(sets, tokenizer, 2, 0)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in SHAPES]


def written(processor, question: str, answer: str | None, image: Image.Image):
    """Return the processor's inputs for one question, with its answer or up to it."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(messages, add_generation_prompt=answer is None)
    return processor(text=[text], images=[image], return_tensors="pt")


def test_turns_that_share_an_image_are_learned_as_if_each_were_asked_alone(scripts, untrained):
    model, processor, lessons = untrained
    images = pictures()
    seen = processor.image_processor(images=images, return_tensors="pt")
    packed = lessons.pack(list(range(len(SHAPES))), lessons.turns)
    with torch.no_grad():
        together, _ = scripts.training.answer_losses(model, packed | dict(seen), bf16=False)
        alone = [one_by_one(model, processor, image, *turn) for image in images for turn in TURNS]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert together.std() > 0.1


def one_by_one(model, processor, image, question: str, answer: str) -> torch.Tensor:
    """Return the loss of every token of an answer by the model's own positions, up to the end of the turn."""
    whole, asked = (written(processor, question, text, image) for text in (answer, None))
    start = asked["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][:, :start], asked["input_ids"])
    end = whole["input_ids"][0].tolist().index(processor.tokenizer.eos_token_id, start) + 1
    logits = model(**whole).logits[0, start - 1 : end - 1]
    return torch.nn.functional.cross_entropy(logits, whole["input_ids"][0, start:end], reduction="none")


def test_images_are_cut_in_the_order_and_size_of_the_image_processor(scripts, untrained):
    _, processor, lessons = untrained
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    batch = processor.image_processor(images=[image], return_tensors="pt")
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(scripts.qwen.patches(pixels), batch["pixel_values"], rtol=1e-5, atol=1e-5)
    grids = processor.image_processor(images=pictures(), return_tensors="pt")["image_grid_thw"]
    made = lessons.images(torch.arange(len(SHAPES)))
    assert torch.equal(made["image_grid_thw"], grids)
    assert made["pixel_values"].shape == (int(grids.prod(1).sum()), 3 * 2 * 8 * 8)


def test_the_recipes_batches_reach_every_weight(scripts, untrained):
    model, _, lessons = untrained
    for part in lessons(0):
        losses, _ = scripts.training.answer_losses(model, part, bf16=False)
        losses.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model.zero_grad()


def test_the_encoder_learns_each_patch_from_the_same_patch_of_clip(scripts, untrained):
    numbers = torch.arange(36.0).reshape(1, 1, 6, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    cut = scripts.qwen.patches(numbers.expand(1, 3, 48, 48))
    assert torch.equal(cut[:, 0], scripts.distil.merged_order(6, 2).float())
    model, _, lessons = untrained
    student = copy.deepcopy(model)
    teaching = scripts.distil.Distillation(student, ASSETS / "tiny-clip", steps=12)
    seen = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    errors = [teaching.learn(seen, scripts.qwen.patches(seen), bf16=False) for _ in range(12)]
    assert errors[-1] < 0.9 * errors[0]
    assert torch.equal(student.lm_head.weight, model.lm_head.weight)


# ------------------------------------------------------------------------------------- the asset


@pytest.fixture(scope="module")
def model():
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def processor():
    return load_chat_processor(resolve_model("tiny-qwen"))


@pytest.fixture(scope="module")
def record():
    return json.loads((FOLDER / "pretrain.json").read_text())


def test_it_has_at_most_twelve_megabytes_of_float32(model):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12e6
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_question_is_written_in_qwens_chat_format(processor):
    ids = written(processor, "What?", None, Image.new("RGB", (48, 48)))["input_ids"][0]
    images = "<|image_pad|>" * 9
    assert processor.tokenizer.decode(ids) == (
        f"<|im_start|>user\n<|vision_start|>{images}<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(("shape", "tokens"), [((48, 48), 9), ((72, 96), 12), ((96, 72), 12), ((28, 28), 9)])
def test_a_picture_keeps_its_aspect_ratio(model, processor, shape, tokens):
    batch = written(processor, "What?", None, Image.new("RGB", shape))
    assert (batch["input_ids"] == model.config.image_token_id).sum() == tokens


def test_it_answers_as_well_as_its_record_says_and_better_than_a_guess(model, processor, record):
    row = record["zero_shot_test"]["scene-colour"]
    data = load_split(load_recipe("scene-colour"), "test").take(range(120))
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in data.questions
    ]
    batch = processor(text=texts, images=[e.image for e in data], padding=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=8, do_sample=False)
    said = processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    score = np.mean([text.strip() in right for text, right in zip(said, data.answers, strict=True)])
    assert score > row["guess"] + 0.1
    assert abs(score - row["score"]) < 0.15


def test_its_record_names_what_it_has_seen(model, record):
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    llava = json.loads((ASSETS / "tiny-llava" / "pretrain.json").read_text())
    assert (record["pretrain_sets"], record["shares"]) == (llava["pretrain_sets"], llava["shares"])
    assert all("tiny-qwen" in load_recipe(name).seen_by for name in record["pretrain_sets"])
