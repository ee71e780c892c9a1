"""Answers are the harness's: a checkpoint's generation settings change none, a user's are checked and recorded, an adapter answers on its base."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.saved_run import run_identity
from llava_keeplora_eval import EvalError, predict_to_file, read_predictions
from llava_keeplora_eval.content import model_content
from llava_keeplora_eval.generation import SETTINGS, check_generation
from llava_keeplora_eval.models import load_predictor, made_by
from llava_keeplora_eval.predictions import maker_path
from llava_keeplora_recipes import load_recipe, load_split

#: What checkpoints on the Hub set, one kind each.
FOUND = {
    "repetition_penalty": 5.0,
    "num_beams": 4,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(5, 120)),
    "begin_suppress_tokens": list(range(5, 200)),
    "min_length": 500,
    "min_new_tokens": 8,
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 3,
    "bad_words_ids": [[i] for i in range(5, 120)],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 8,
    "encoder_repetition_penalty": 4.0,
    "exponential_decay_length_penalty": [1, 5.0],
    "sequence_bias": [[[9], 50.0]],
    "guidance_scale": 3.0,
    "penalty_alpha": 0.6,
    "max_length": 3,
    "use_cache": False,
    "cache_implementation": "static",
    "renormalize_logits": True,
    "length_penalty": -9.0,
    "early_stopping": True,
    "stop_strings": ["a"],
    "max_time": 1e-9,
    "prompt_lookup_num_tokens": 3,
    "top_p": 0.1,
    "output_scores": True,
    "return_dict_in_generate": True,
    "remove_invalid_values": True,
}


@pytest.fixture(scope="module")
def questions(mixed_tasks):
    return load_split(load_recipe(str(mixed_tasks[0])), "test")


def answers(folder, data, **options):
    return load_predictor(str(folder), data.recipe, "cpu", 8, **options).predict(
        [data[i] for i in range(len(data))]
    )


@pytest.fixture(scope="module")
def greedy(tiny_llava, questions):
    """Greedy answers step by step, from the model's logits alone."""
    predictor = load_predictor(str(tiny_llava), questions.recipe, "cpu", 8)
    chat, found = predictor.chat, []
    from llava_keeplora_eval.chat import image_inputs, question_text

    for i in range(len(questions)):
        example = questions[i]
        ids = torch.tensor(
            [
                chat.prompt(
                    question_text(questions.recipe, example.question),
                    [(image.height, image.width) for image in example.images],
                ).prompt
            ]
        )
        start, pictures = ids.shape[1], image_inputs(chat.processor, example.images)
        for _ in range(8):
            with torch.no_grad():
                step = (
                    predictor.model(input_ids=ids, attention_mask=torch.ones_like(ids), **pictures)
                    .logits[0, -1]
                    .argmax()
                )
            ids = torch.cat([ids, step[None, None]], dim=1)
            if int(step) in predictor._stops():
                break
        found.append(chat.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())
    return found


def test_answers_are_greedy_by_the_logits(tiny_llava, questions, greedy):
    assert answers(tiny_llava, questions) == greedy and len(set(greedy)) > 0


@pytest.mark.parametrize("key", [*FOUND, "all"])
def test_what_a_checkpoint_sets_for_generation_changes_no_answer(
    tiny_llava, questions, greedy, tmp_path, key
):
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    path = folder / "generation_config.json"
    settings = (
        {name: value for name, value in FOUND.items() if "forced" not in name}
        if key == "all"
        else {key: FOUND[key]}
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert answers(folder, questions) == greedy


def test_settings_that_a_user_chooses_are_those_of_generate(tiny_llava, questions, greedy):
    chosen = answers(tiny_llava, questions, generation={"repetition_penalty": 5.0, "num_beams": 3})
    assert chosen != greedy
    predictor = load_predictor(
        str(tiny_llava), questions.recipe, "cpu", 8, generation={"repetition_penalty": 5.0, "num_beams": 3}
    )
    assert (
        predictor.settings["generation"]["num_beams"] == 3
        and predictor.settings["generation"]["repetition_penalty"] == 5.0
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"do_sample": True}, "do_sample could not be repeated"),
        ({"num_beam": 4}, "num_beam cannot be set; did you mean 'num_beams'"),
        ({"num_beams": "4"}, "takes int"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"length_penalty": float("inf")}, "no number"),
        ({"num_beams": 0}, "num_beams is 0, but it is 1 or more"),
        ({"suppress_tokens": ["a"]}, ".*lists ids of tokens"),
        ({"repetition_penalty": True}, "takes int or float"),
        ({"eos_token_id": 3}, "cannot be set"),
        ({"max_new_tokens": 3}, "cannot be set"),
    ],
)
def test_a_setting_that_is_none_is_refused_by_name(settings, said, llava_tree, tmp_path):
    with pytest.raises(EvalError, match=f"generation.*{said}"):
        check_generation(settings)
    with pytest.raises(ConfigError, match=f"evaluation.*generation.*{said}"):
        parse_config(llava_tree(tmp_path, evaluation={"generation": settings}))
    assert "do_sample" not in SETTINGS


def test_settings_of_answers_are_part_of_what_a_run_is(llava_tree, tmp_path):
    plain, beams = (
        run_identity(parse_config(llava_tree(tmp_path, evaluation={"generation": chosen})))
        for chosen in ({}, {"num_beams": 2})
    )
    assert "generation" not in plain["evaluation"] and beams["evaluation"]["generation"] == {"num_beams": 2}


def change_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).add_(1.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_template(folder):
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}Q: <image> {{ m['content'][-1]['text'] }} A:{% endfor %}"
    )


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (change_weights, {}, "model differ"),
        (change_template, {}, "model differ"),
        (lambda folder: None, {"generation": {"num_beams": 2}}, "generation differ"),
        (lambda folder: None, {"max_new_tokens": 3}, "generation differ"),
    ],
)
def test_a_file_of_answers_goes_on_with_what_made_it_alone(
    tiny_llava, questions, tmp_path, change, options, said
):
    folder, path = shutil.copytree(tiny_llava, tmp_path / "model"), tmp_path / "answers.jsonl"

    def predict(**more):
        predictor = load_predictor(str(folder), questions.recipe, "cpu", **{"max_new_tokens": 4, **more})
        return predict_to_file(predictor, questions, path, made_by=made_by(str(folder), predictor))

    assert predict() == len(questions)
    assert predict() == 0
    record = json.loads(maker_path(path).read_text())
    assert set(record) == {"model", "generation", "dtype"} and record["dtype"] == "float32"
    before = path.read_bytes()
    change(folder)
    with pytest.raises(
        EvalError,
        match=f"answers.jsonl holds answers that were made otherwise \\({said}\\); predict into a new file",
    ):
        predict(**options)
    assert path.read_bytes() == before and len(read_predictions(path, questions)) == len(questions)


def test_a_file_without_a_record_is_scored_and_not_gone_on_with(tiny_llava, questions, tmp_path):
    path = tmp_path / "answers.jsonl"
    predictor = load_predictor(str(tiny_llava), questions.recipe, "cpu", 4)
    predict_to_file(predictor, questions, path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    assert len(read_predictions(path, questions)) == 3
    with pytest.raises(EvalError, match="no record says what made them; predict into a new file"):
        predict_to_file(predictor, questions, path, made_by=made_by(str(tiny_llava), predictor))


def test_a_file_of_two_models_is_not_scored(tiny_llava, questions, tmp_path):
    predictor = load_predictor(str(tiny_llava), questions.recipe, "cpu", 4)
    paths = [tmp_path / f"{i}.jsonl" for i in range(2)]
    for i, path in enumerate(paths):
        predict_to_file(predictor, questions, path, made_by={"model": i})
    lines = [path.read_text().splitlines(keepends=True) for path in paths]
    paths[0].write_text("".join([*lines[0][:2], *lines[1][2:]]))
    with pytest.raises(EvalError, match="line 3 of .* was made by another model"):
        read_predictions(paths[0], questions)


def test_the_revision_of_an_adapters_base_is_loaded_and_recorded(tmp_path, monkeypatch):
    from llava_keeplora_eval import models

    config = {"base_model_name_or_path": "user/base", "revision": "abc123"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert models.adapter_base(str(tmp_path)) == ("user/base", "abc123")
    assert models.adapter_base(str(tmp_path), "elsewhere") == ("elsewhere", None)
    asked = []
    monkeypatch.setattr(models, "resolve_model", lambda name: name)
    monkeypatch.setattr(
        models, "model_content", lambda place, revision=None: asked.append((place, revision)) or {}
    )
    monkeypatch.setattr(
        models, "model_family", lambda place, revision=None: asked.append((place, revision)) or "llava"
    )
    monkeypatch.setattr(
        models,
        "load_llava",
        lambda place, device=None, revision=None: asked.append((place, revision)) or (None, None),
    )
    monkeypatch.setattr(models, "with_adapter", lambda model, folder: 1 / 0)
    made_by(str(tmp_path), SimpleNamespace(settings={}))
    with pytest.raises(ZeroDivisionError):
        load_predictor(str(tmp_path), SimpleNamespace(kind="vqa"), "cpu")
    assert asked == [("user/base", "abc123")] * 3
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"revision": 3}))
    with pytest.raises(EvalError, match="has the revision 3 of its base"):
        models.adapter_base(str(tmp_path))


def test_a_peft_adapter_answers_on_its_base(tiny_llava, questions, tmp_path):
    import peft
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(shutil.copytree(tiny_llava, tmp_path / "merged"))
    assert (
        answers(tmp_path / "adapter", questions)
        == answers(tmp_path / "merged", questions)
        != answers(tiny_llava, questions)
    )
    predictor = load_predictor(str(tmp_path / "adapter"), questions.recipe, "cpu", base=str(tiny_llava))
    assert (
        "adapter_model.safetensors"
        in made_by(str(tmp_path / "adapter"), predictor, str(tiny_llava))["adapter"]
    )
    record = tmp_path / "adapter/keeplora_export.json"
    record.write_text(json.dumps({"base": model_content(str(tiny_llava))}))
    load_predictor(str(tmp_path / "adapter"), questions.recipe, "cpu", base=str(tiny_llava))
    with pytest.raises(
        EvalError, match=r"is not the one that the adapter .* was trained on .*weights differ"
    ):
        load_predictor(str(tmp_path / "adapter"), questions.recipe, "cpu", base=str(tmp_path / "merged"))
    record.unlink()
    weights = tmp_path / "adapter/adapter_model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    save_file(
        {**tensors, next(iter(tensors)): torch.full_like(next(iter(tensors.values())), float("nan"))},
        weights,
        {"format": "pt"},
    )
    with pytest.raises(EvalError, match="holds NaN"):
        answers(tmp_path / "adapter", questions)
    save_file(dict(list(tensors.items())[1:]), weights, {"format": "pt"})
    with pytest.raises(EvalError, match="1 of its tensors are missing"):
        answers(tmp_path / "adapter", questions)
    weights.write_bytes(whole)
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(EvalError, match="names no base model; say where it lies with --base"):
        answers(tmp_path / "adapter", questions)
    with pytest.raises(EvalError, match="is no folder with an adapter"):
        answers(tiny_llava, questions, base=str(tiny_llava))


@pytest.mark.parametrize("stops", ["</s>", [2, "3"]])
def test_end_tokens_that_are_no_ids_are_refused(tiny_llava, questions, tmp_path, stops):
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    with pytest.raises(EvalError, match="eos_token_id|cannot be loaded"):
        answers(folder, questions)


@pytest.mark.parametrize("kind", ["blip", "bert", "mllama"])
def test_training_and_evaluation_refuse_the_same_models(kind, tmp_path, questions):
    import transformers

    from llava_keeplora.config import ModelConfig
    from llava_keeplora.models import open_model

    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(EvalError, match=f"is a '{kind}' model, and supported are the types ") as evaluated:
        load_predictor(str(tmp_path), questions.recipe, "cpu")
    with pytest.raises(ConfigError) as trained:
        open_model(ModelConfig(str(tmp_path)))
    assert str(evaluated.value) == str(trained.value)
