"""The LLaVA family: chat text, token ids, labels, loss, layers by part, generation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from llava_keeplora.adapters import AdapterInit, attach, detach
from llava_keeplora.config import EvaluationConfig, ModelConfig
from llava_keeplora.models import load_model
from llava_keeplora.sequence.data import Batches, ImageCache
from llava_keeplora_eval.chat import Chat
from llava_keeplora_eval.chat_text import render
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.processors import load_chat_processor
from llava_keeplora_recipes import load_recipe, load_split

KINDS = ("llava", "llava_next", "llava_onevision")
TURNS = [
    (["0.png"], "what color is it?", "red"),
    (["1.png", "2.png"], "are the pictures alike?", "not at all"),
    ([], "what is two plus two?", "4"),
    (["3.png"], "how many?", "three"),
]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, make_llava, tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def family(folder):
    return load_model(ModelConfig(str(folder)), EvaluationConfig(max_new_tokens=8))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Questions about one image, two and none, in LLaVA's JSON; the images have different shapes."""
    root = tmp_path_factory.mktemp("questions")
    for i, size in enumerate(((16, 16), (40, 24), (20, 32), (33, 16))):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    rows = []
    for i, (images, question, answer) in enumerate(TURNS):
        turns = [
            {"from": "human", "value": "<image>\n" * len(images) + question},
            {"from": "gpt", "value": answer},
        ]
        rows.append({"id": f"q{i}", "conversations": turns} | ({"image": images} if images else {}))
    (root / "train.json").write_text(json.dumps(rows))
    (root / "questions.yaml").write_text(
        "{name: questions, version: 1, kind: vqa, metric: exact_match, licence: CC0-1.0,"
        " source: {format: llava_json, path: .}, splits: {train: train.json, test: train.json}}"
    )
    return load_recipe(root / "questions.yaml")


@pytest.fixture
def data(recipe):
    return load_split(recipe, "train")


@pytest.fixture
def inputs(family, data):
    return family.inputs(data, ImageCache(family.prepare, budget_gb=1.0).split(data))


def test_the_token_ids_of_a_question_are_those_of_the_processor_itself(folder, data):
    processor = load_chat_processor(str(folder))
    chat = Chat(processor)
    for example in data:
        text = render(processor, example.question, len(example.images))
        whole = processor(
            text=[text], images=[example.images] if example.images else None, return_tensors="pt"
        )
        assert (
            chat.prompt(example.question, [(i.height, i.width) for i in example.images]).prompt
            == whole["input_ids"][0].tolist()
        )


def test_a_checkpoint_without_a_chat_template_gets_that_of_llava_one_and_a_half(tiny_llava):
    text = render(load_chat_processor(str(tiny_llava)), "What is it?", 1)
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
        "answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT:"
    )


def test_a_checkpoints_own_chat_template_is_used(tiny_llava):
    processor = load_chat_processor(str(tiny_llava))
    processor.chat_template = (
        "{% for m in messages %}[{{ m['content'] | length }}]{% endfor %}{{ 'GO:' if add_generation_prompt }}"
    )
    assert render(processor, "What is it?", 1) == "[2]GO:"


def test_only_the_answer_and_the_end_of_text_are_supervised(family, inputs, data):
    tokenizer = family.processor.tokenizer
    batch = inputs.collate(range(4))
    for row, (_, _, answer) in enumerate(TURNS):
        labels, ids = batch["labels"][row], batch["input_ids"][row]
        supervised = labels != -100
        assert tokenizer.decode(labels[supervised]) == f" {answer}{tokenizer.eos_token}"
        assert torch.equal(ids[supervised], labels[supervised])
        # Nothing after the end of text, and nothing of the question.
        first = int(supervised.nonzero()[0])
        assert tokenizer.decode(ids[:first], skip_special_tokens=True).endswith("ASSISTANT:")
        assert batch["attention_mask"][row].sum() == first + supervised.sum()
    assert inputs.weights == [(batch["labels"][row] != -100).sum() for row in range(4)]


def test_the_loss_is_the_models_own_on_the_same_labels(family, inputs, data):
    batch = inputs.collate([0, 1, 3])
    ours = family.task(data.recipe)(**batch)["loss"]
    own = {key: value for key, value in batch.items() if key != "image_rows"}
    torch.testing.assert_close(ours, family.model(**own).loss)


def test_an_example_counts_the_same_in_any_batch(family, inputs, data):
    task = family.task(data.recipe)
    with torch.no_grad():
        together = task(**inputs.collate(range(4)))
        alone = [task(**inputs.collate([i])) for i in range(4)]
    weights = torch.tensor(inputs.weights, dtype=torch.float32)
    expected = (torch.stack([out["loss"] for out in alone]) * weights).sum() / weights.sum()
    torch.testing.assert_close(together["loss"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        together["logits"], torch.cat([out["logits"] for out in alone]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_gradient_pass_is_the_gradient_of_the_mean_over_all_answer_tokens(
    family, inputs, data, batch_size, dense_gradients
):
    layers = {
        n: m
        for part, targets in family.targets.items()
        for n, m in family.linear_layers(part, targets).items()
    }
    task, batches = family.task(data.recipe), Batches(inputs, batch_size)
    captured = dense_gradients(task, layers, batches, batches.weight)

    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    out = task(**inputs.collate(range(4)))
    target = torch.cat([torch.tensor(turn.reply) for turn in inputs.turns])
    expected = torch.autograd.grad(cross_entropy(out["logits"], target), weights)
    for weight in weights:
        weight.requires_grad_(False)
    for name, gradient in zip(layers, expected):
        torch.testing.assert_close(captured[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_gradient_that_counts_examples_is_the_mean_of_the_examples_own(
    family, inputs, data, batch_size, dense_gradients
):
    task = family.task(data.recipe).counting_examples()
    layers = family.linear_layers("language", ("q_proj", "down_proj"))
    batches = Batches(inputs, batch_size)
    captured = dense_gradients(task, layers, batches, len(batches.chosen))
    plain, each = family.task(data.recipe), []
    for i in range(len(inputs)):
        batch = inputs.collate([i])
        each.append(dense_gradients(plain, layers, [(batch, True)], plain.weight(batch)))
    assert len(set(inputs.weights)) > 1
    for name, gradient in captured.items():
        mean = sum(one[name] for one in each) / len(each)
        torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6 + 1e-5 * float(mean.abs().max()))


def test_layers_that_cannot_receive_a_gradient_are_named_and_really_have_none(
    family, inputs, data, dense_gradients
):
    targets = family.targets["vision"]
    named = family.layers_without_gradient("vision", targets)
    used = family.config.vision_feature_layer
    assert len(named) == {-2: len(targets), -1: 0}[used]

    everything = {
        n: m
        for n, m in family.model.named_modules()
        if n.startswith(family.parts["vision"]) and n.rsplit(".", 1)[-1] in targets
    }
    batches = Batches(inputs, 4)
    captured = dense_gradients(family.task(data.recipe), everything, batches, batches.weight)
    assert sorted(named) == sorted(n for n in everything if n not in captured)
    assert set(family.linear_layers("vision", targets)) == set(everything) - set(named)


def test_features_leave_padding_out_and_keep_every_image_token(family, inputs, data, second_moments):
    language = family.linear_layers("language", ("q_proj", "k_proj", "down_proj"))
    parts = dict.fromkeys(language, "language")
    task = family.task(data.recipe)
    whole, single = (second_moments(task, language, parts, Batches(inputs, size)) for size in (4, 1))
    for name, statistic in whole.items():
        torch.testing.assert_close(statistic.matrix, single[name].matrix, rtol=1e-4, atol=1e-4)
    assert all(whole[n] is whole[n.replace("k_proj", "q_proj")] for n in language if "k_proj" in n)


def test_features_are_the_same_in_any_order_and_those_of_vision_are_left_out_only_where_no_example_has_an_image(
    family, inputs, data, second_moments
):
    layers = {
        n: m
        for part, targets in family.targets.items()
        for n, m in family.linear_layers(part, targets).items()
    }
    parts = {n: part for part, targets in family.targets.items() for n in family.linear_layers(part, targets)}

    def moments(*batches):
        return second_moments(
            family.task(data.recipe),
            layers,
            parts,
            [(inputs.collate(list(batch)), True) for batch in batches],
        )

    pictures_first, text_first = moments([0, 1], [2], [3]), moments([2], [0, 1], [3])
    assert text_first.keys() == pictures_first.keys() == layers.keys()
    for name, one in pictures_first.items():
        torch.testing.assert_close(
            text_first[name].matrix, one.matrix, rtol=1e-4, atol=1e-4 * float(one.matrix.abs().max())
        )
    assert moments([2], [2]).keys() == {name for name in layers if parts[name] == "language"}


def test_the_batch_size_does_not_change_an_answer(family, data):
    predictor = family.predictor(data.recipe, ImageCache(family.prepare, budget_gb=1.0).split(data))
    examples = list(data)
    together = predictor.predict(examples)
    assert together == [predictor.predict([example])[0] for example in examples]
    assert any(together), "a random model says something"


def test_answers_are_those_of_the_models_own_greedy_generation(family, data):
    example = data[0]
    processor = family.processor
    given = processor(
        text=[render(processor, example.question, 1)], images=[example.images], return_tensors="pt"
    )
    out = family.model.generate(
        **given, do_sample=False, max_new_tokens=8, pad_token_id=processor.tokenizer.pad_token_id
    )
    expected = processor.tokenizer.decode(
        out[0, given["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()
    assert family.predictor(data.recipe, ImageCache(family.prepare, 1.0).split(data)).predict([example]) == [
        expected
    ]


@pytest.mark.parametrize("attached_first", [True, False])
def test_recomputing_sends_no_gradient_into_frozen_encoders(family, inputs, data, attached_first):
    task, batch = family.task(data.recipe), inputs.collate([0, 1])
    name = next(
        name
        for name, module in family.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model" in name
    )
    wrapper = attach(family.model, {name: AdapterInit(2, 2.0)}) if attached_first else None
    task.activation_checkpointing_enable()
    wrapper = wrapper or attach(family.model, {name: AdapterInit(2, 2.0)})
    asking, tower = [], family.model.model.vision_tower
    handle = tower.register_forward_hook(
        lambda module, args, output: asking.append(output.last_hidden_state.requires_grad)
    )
    try:
        task.train()(**batch)["loss"].backward()
    finally:
        handle.remove()
        task.activation_checkpointing_disable()
        detach(wrapper)
        task.eval()
    assert asking == [False]


def test_activation_checkpointing_does_not_change_the_gradient(family, inputs, data, dense_gradients):
    layers = family.linear_layers("language", ("q_proj",)) | family.linear_layers("vision", ("v_proj",))
    task, batches = family.task(data.recipe), Batches(inputs, 4)
    plain = dense_gradients(task, layers, batches, batches.weight)
    task.train()
    task.activation_checkpointing_enable()
    try:
        again = dense_gradients(task, layers, batches, batches.weight)
    finally:
        task.activation_checkpointing_disable()
        task.eval()
    for name in layers:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-4, atol=1e-6)


def test_it_runs_in_bf16(folder, data):
    family = load_model(ModelConfig(str(folder), dtype="bfloat16"), EvaluationConfig(max_new_tokens=4))
    images = ImageCache(family.prepare, 1.0).split(data)
    loss = family.task(data.recipe)(**family.inputs(data, images).collate(range(4)))["loss"]
    assert torch.isfinite(loss)
    assert len(family.predictor(data.recipe, images).predict(list(data))) == 4


def test_a_record_that_is_too_long_with_its_image_tokens_is_named_before_any_weight_is_loaded(
    tiny_llava, data, monkeypatch
):
    from llava_keeplora.models import open_model

    family = open_model(ModelConfig(str(tiny_llava), max_length=180))
    words = r"record 'q0' of questions \(train.json\) has \d+ tokens, \d+ of them before the answer and image tokens included, and the model takes 180"
    with pytest.raises(EvalError, match=words):
        family.inputs(data, ImageCache(family.prepare, 1.0).split(data))
    assert not hasattr(family, "model")


def test_a_record_with_nothing_to_learn_is_named(tiny_llava, tmp_path):
    from llava_keeplora.models import open_model

    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": " "}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": "q7", "image": "0.png", "conversations": turns}]))
    (tmp_path / "r.yaml").write_text(
        "{name: mute, version: 1, kind: vqa, metric: exact_match, licence: CC0-1.0, source: {format: llava_json, path: .}, splits: {train: train.json}}"
    )
    data = load_split(load_recipe(tmp_path / "r.yaml"), "train")
    family = open_model(ModelConfig(str(tiny_llava)))
    with pytest.raises(EvalError, match=r"record 'q7' of mute \(train.json\) has an empty answer"):
        family.inputs(data, ImageCache(family.prepare, 1.0).split(data))


def test_a_batch_of_text_alone_gives_the_vision_adapters_a_gradient_of_zero_and_the_same_loss(
    family, inputs, data
):
    """Processes that share gradients would otherwise wait for each other forever."""
    layers = family.linear_layers("vision", ("v_proj",)) | family.linear_layers("connector", ("linear_1",))
    task, batch = family.task(data.recipe), inputs.collate([2])
    assert "pixel_values" not in batch
    frozen = task(**batch)["loss"]
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    loss = task(**batch)["loss"]
    gradients = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    assert torch.equal(loss.detach(), frozen.detach())
    assert all(not gradient.any() for gradient in gradients)
