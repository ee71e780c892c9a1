"""Every type of image-text-to-text model, on a small checkpoint of its real architecture and layout, beside plain
transformers: what it is given, what it learns, what it answers."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from llava_keeplora.config import EvaluationConfig, ModelConfig
from llava_keeplora.models import Prepared, load_model
from llava_keeplora.testing.families import (
    check_inputs,
    check_layer_gradients,
    check_predictions,
    check_skeleton,
)
from llava_keeplora_eval.chat import Chat
from llava_keeplora_eval.chat_text import render
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_recipes import load_recipe, load_split
from llava_keeplora_recipes.records import Message
from small_vlms import SMALL_VLMS

TURNS = [
    (["0.png"], "What is it?", "a red cat"),
    (["1.png", "2.png"], "Who is in the picture?", "no dog"),
    ([], "yes or no", "no"),
    (["3.png"], "What is red?", "the answer"),
]
#: Types whose processor takes no question without an image.
WITH_IMAGES_ONLY = ("paligemma",)
#: Inputs of tokens that a type cannot do without.
NEEDED = {
    "qwen2_vl": "mm_token_type_ids",
    "qwen2_5_vl": "mm_token_type_ids",
    "qwen3_vl": "mm_token_type_ids",
    "gemma3": "token_type_ids",
}


#: What costs most is checked of these in every suite, of the others behind the slow marker.
QUICK = ("qwen3_vl", "idefics3", "gemma3", "pixtral", "paligemma")
of_quick_kinds = pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in SMALL_VLMS], indirect=True
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with images of four shapes."""
    root = tmp_path_factory.mktemp("shapes")
    for i, size in enumerate(((30, 30), (60, 24), (20, 44), (33, 16))):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    return root


def load_turns(root, name, turns):
    rows = []
    for i, (images, question, answer) in enumerate(turns):
        said = [
            {"from": "human", "value": "<image>\n" * len(images) + question},
            {"from": "gpt", "value": answer},
        ]
        rows.append({"id": f"q{i}", "conversations": said} | ({"image": images} if images else {}))
    return load_rows(root, name, rows)


def load_rows(root, name, rows):
    (root / f"{name}.json").write_text(json.dumps(rows))
    (root / f"{name}.yaml").write_text(
        f"{{name: {name}, version: 1, kind: vqa, metric: exact_match, licence: CC0-1.0,"
        f" source: {{format: llava_json, path: .}}, splits: {{train: {name}.json, test: {name}.json}}}}"
    )
    return load_split(load_recipe(root / f"{name}.yaml"), "test")


@pytest.fixture(scope="module", params=list(SMALL_VLMS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, small_vlm):
    return small_vlm(kind)


@pytest.fixture(scope="module")
def data(kind, pictures):
    turns = [turn for turn in TURNS if turn[0] or kind not in WITH_IMAGES_ONLY]
    return load_turns(pictures, "with-images-only" if kind in WITH_IMAGES_ONLY else "mixed", turns)


def load(folder):
    return load_model(ModelConfig(str(folder)), EvaluationConfig(max_new_tokens=6))


@pytest.fixture(scope="module")
def family(folder):
    """The loaded model; shared, so don't change it."""
    return load(folder)


@pytest.fixture
def own_family(folder):
    """The same for a test that changes it."""
    return load(folder)


def processed(processor, example, **options):
    """What the processor itself makes of a question."""
    text = render(processor, example.question, len(example.images), example.history)
    begun = bool(processor.tokenizer.bos_token) and text.startswith(processor.tokenizer.bos_token)
    return processor(
        text=[text],
        images=[list(example.images)] if example.images else None,
        add_special_tokens=not begun,
        return_tensors="pt",
        **options,
    )


def test_inputs_are_the_processors_own(family, data):
    chat = Chat(family.processor)
    for example in data:
        encoding = chat.prompt(example.question, [(i.height, i.width) for i in example.images])
        own = dict(processed(family.processor, example))
        own.pop("labels", None)
        given = {"input_ids": torch.tensor([encoding.prompt])}
        given |= {key: torch.tensor([row]) for key, row in encoding.extra.items()}
        given |= family.prepare([example])[0]
        assert given.keys() | {"attention_mask"} == own.keys() | {"attention_mask"}
        for key, value in given.items():
            assert torch.equal(value, own[key]), key
        assert own["input_ids"][0].tolist().count(family.processor.tokenizer.bos_token_id) <= 1


def test_the_loss_is_the_models_own_on_the_same_labels(family, data):
    inputs = family.inputs(data, Prepared(family, data))
    batch = inputs.collate(range(len(data)))
    plain = {key: value for key, value in batch.items() if key != "image_rows"}
    with torch.no_grad():
        ours, own = family.task(data.recipe)(**batch)["loss"], family.model(**plain).loss
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)
    for turn, (_, _, answer) in zip(inputs.turns, TURNS, strict=False):
        learned = family.processor.tokenizer.decode(turn.reply, skip_special_tokens=False)
        end = Chat(family.processor).answer_frame[1]
        assert learned.endswith(end.strip()) and (answer in learned or data.recipe.name != "mixed")


def test_data_check_shows_the_ids_that_the_model_gets(family, data):
    inputs = family.inputs(data, Prepared(family, data))
    for row in range(len(data)):
        ids = family.preparation.show(data, row)[-1].removeprefix("ids: ")
        shown, learned = [], []
        for word in re.findall(r"⟦|⟧|\d+ × \d+|\d+", ids):
            if word in "⟦⟧":
                learned.append(len(shown))
                continue
            token, _, count = word.partition(" × ")
            shown += [int(token)] * int(count or 1)
        batch = inputs.collate([row])
        assert shown == batch["input_ids"][0].tolist()
        start, end = learned
        assert shown[start:end] == batch["labels"][0][batch["labels"][0] >= 0].tolist()


@of_quick_kinds
def test_the_contract_of_a_family_holds(own_family, data):
    check_inputs(own_family, data)
    check_layer_gradients(own_family, data)
    check_predictions(own_family, data)
    check_skeleton(own_family, data)


@of_quick_kinds
def test_the_first_of_a_batch_is_a_batch_of_the_first(family, data):
    inputs, task = family.inputs(data, Prepared(family, data)), family.task(data.recipe)
    for count in range(1, len(data) + 1):
        first = task.first(inputs.collate(range(len(data))), count)
        own = inputs.collate(range(count))
        assert first.keys() - {"image_rows"} == own.keys() - {"image_rows"}
        with torch.no_grad():
            torch.testing.assert_close(task(**first)["loss"], task(**own)["loss"], atol=1e-5, rtol=1e-5)


def test_a_text_alone_gives_every_part_a_gradient(kind, own_family, pictures):
    if kind in WITH_IMAGES_ONLY:
        data = load_turns(pictures, "text", [([], "yes or no", "no")])
        with pytest.raises(EvalError, match="refuses a question with 0 images"):
            own_family.inputs(data, Prepared(own_family, data))
        return
    data = load_turns(pictures, "text", [([], "yes or no", "no")])
    layers = [
        layer
        for part in own_family.targets
        for layer in own_family.linear_layers(part, own_family.targets[part]).values()
    ]
    for layer in layers:
        layer.weight.requires_grad_(True)
    task = own_family.task(data.recipe)
    task(**own_family.inputs(data, Prepared(own_family, data)).collate([0]))["loss"].backward()
    assert all(layer.weight.grad is not None for layer in layers)


@of_quick_kinds
def test_a_batch_is_answered_as_one_by_one_and_as_plain_generate(family, data):
    predictor = family.predictor(data.recipe, Prepared(family, data))
    examples = [data[i] for i in range(len(data))]
    answers = predictor.predict(examples)
    assert answers == [predictor.predict([example])[0] for example in examples]
    stops = [*Chat(family.processor).end_ids]
    own = family.model.generation_config.eos_token_id
    stops += own if isinstance(own, list) else [own]
    for example, answer in zip(examples, answers, strict=True):
        inputs = processed(family.processor, example)
        inputs.pop("labels", None)
        out = family.model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=predictor.chat.pad_id,
        )
        said = family.processor.tokenizer.decode(
            out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert answer == said.strip()


@pytest.mark.parametrize("kind", NEEDED, indirect=True)
def test_an_input_that_is_left_out_changes_what_is_computed(kind, family, data):
    batch = family.inputs(data, Prepared(family, data)).collate(range(len(data)))
    batch.pop("image_rows")
    without = {key: value for key, value in batch.items() if key != NEEDED[kind]}
    with torch.no_grad():
        whole = family.model(**batch).logits
        try:
            assert not torch.allclose(whole, family.model(**without).logits, atol=1e-5)
        except ValueError as error:
            assert NEEDED[kind] in str(error)


def test_images_between_words_stay_there_or_are_refused(kind, family):
    chat, sizes = Chat(family.processor), [(30, 30), (24, 60)]
    if kind in WITH_IMAGES_ONLY:
        with pytest.raises(EvalError, match="between words"):
            chat.prompt("Is <image> like <image>?", sizes)
        return
    ids = chat.prompt("Is <image> like <image>?", sizes).prompt
    shown = ["▣" if i in chat.image_ids else chat.tokenizer.decode([i]) for i in ids]
    text = "".join(shown)
    assert "Is" in text and text.index("Is") < text.index("▣") < text.index("like") < text.rindex(
        "▣"
    ) < text.index("?")


def test_every_earlier_answer_is_learned_where_the_template_puts_it(kind, family):
    history = (Message("user", "What is it?"), Message("assistant", "a cat"))
    chat = Chat(family.processor)
    if kind in WITH_IMAGES_ONLY:
        with pytest.raises(EvalError, match="single questions"):
            chat.turn("red?", [(30, 30)], "no", history)
        return
    turn = chat.turn("red?", [(30, 30)], "no", history)
    ((start, end),) = turn.earlier
    assert chat.tokenizer.decode(turn.prompt[start:end], skip_special_tokens=True).strip() == "a cat"
    alone = chat.turn("What is it?", [(30, 30)], "a cat")
    assert turn.prompt[:start] == alone.prompt and turn.prompt[start:end] in (alone.reply, alone.reply[:-1])
    assert turn.learned == len(turn.reply) + end - start


def test_a_conversation_is_trained_on_every_answer_and_asked_for_its_last(kind, family, pictures):
    if kind in WITH_IMAGES_ONLY:
        return
    said = ["<image>\nWhat is it?", "a cat", "red or blue?", "red", "Who is it?", "no dog"]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    data = load_rows(pictures, "talk", [{"id": "t", "image": "1.png", "conversations": turns}])
    batch = family.inputs(data, Prepared(family, data)).collate([0])
    learned = family.processor.tokenizer.decode(
        batch["labels"][batch["labels"] >= 0], skip_special_tokens=True
    ).split()
    assert " ".join(learned) == "a cat red no dog" or "".join(learned) == "acatrednodog"
    with torch.no_grad():
        own = family.model(**{key: value for key, value in batch.items() if key != "image_rows"}).loss
        torch.testing.assert_close(family.task(data.recipe)(**batch)["loss"], own, atol=1e-5, rtol=1e-5)
    example = data[0]
    inputs = processed(family.processor, example)
    predictor = family.predictor(data.recipe, Prepared(family, data))
    stops = sorted({*Chat(family.processor).end_ids})
    out = family.model.generate(
        **inputs, max_new_tokens=6, do_sample=False, eos_token_id=stops, pad_token_id=0
    )
    plain = family.processor.tokenizer.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert predictor.predict([example]) == [plain.strip()]
    shown = family.preparation.show(data, 0)
    assert "\n".join(shown).count("⟦") == 2 * 3 and shown[-1].startswith("ids: ")


def test_the_files_of_a_type_are_a_megabyte_at_most(folder):
    assert (folder / "model.safetensors").stat().st_size < 1 << 20
