"""Checkpoints by content: damaged, incomplete and foreign ones are refused by name, and what changes an answer changes the record."""

import json
import logging
import os
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_keeplora.config import ModelConfig
from llava_keeplora.errors import UserError
from llava_keeplora.models import load_model, open_model
from llava_keeplora_eval import EvalError
from llava_keeplora_eval.checkpoints import check_values, load_checked
from llava_keeplora_eval.content import content_changes, content_hash, model_content
from llava_keeplora_eval.guard import guarded
from llava_keeplora_eval.models import load_clip, load_preparation


@pytest.fixture
def copied(tiny_clip, tmp_path):
    """A copy of the random CLIP."""
    return shutil.copytree(tiny_clip, tmp_path / "model")


def load(folder):
    from transformers import CLIPModel

    return load_checked(CLIPModel, str(folder))


def rewrite(folder, change):
    """Write the weights anew after a change of the dictionary of tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def split_in_two(folder):
    """Lay the weights out as two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shards = {
        name: {key: value for n, (key, value) in enumerate(sorted(tensors.items())) if n % 2 == i}
        for i, name in enumerate(names)
    }
    for name, content in shards.items():
        save_file(content, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, content in shards.items() for key in content}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def test_a_whole_checkpoint_is_loaded_in_one_file_in_shards_and_pickled(copied):
    expected = load(copied).state_dict()
    split_in_two(copied)
    assert all(torch.equal(value, expected[key]) for key, value in load(copied).state_dict().items())
    for path in copied.glob("model*"):
        path.unlink()
    for zipped in (True, False):
        torch.save(expected, copied / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert all(torch.equal(value, expected[key]) for key, value in load(copied).state_dict().items())


def test_tensors_that_newer_code_computes_are_no_fault(copied):
    rewrite(
        copied, lambda tensors: tensors.update({"text_model.embeddings.position_ids": torch.arange(12)[None]})
    )
    load(copied)


def drop_layer(tensors):
    for key in [key for key in tensors if ".encoder.layers.1." in key]:
        tensors.pop(key)


def drop_one(tensors):
    tensors.pop("logit_scale")


def add(tensors):
    tensors["text_model.encoder.layers.7.mlp.fc1.weight"] = torch.zeros(2, 2)


def reshape(tensors):
    tensors["visual_projection.weight"] = torch.zeros(3, 5)


def spoil(tensors):
    tensors["text_projection.weight"][1, 2] = float("nan")


def overflow(tensors):
    tensors["text_projection.weight"][0, 0] = float("inf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_layer, r"lacks 32 of the model's tensors \(text_model.encoder.layers.1"),
        (drop_one, r"lacks 1 of .*logit_scale"),
        (add, "holds 1 tensors that the model .* does not have .*layers.7"),
        (reshape, r"another shape .*visual_projection.weight: \(3, 5\) for"),
        (spoil, r"NaN or infinity \(in 1 tensors of the model: text_projection.weight\)"),
        (overflow, "NaN or infinity"),
    ],
)
def test_a_checkpoint_that_does_not_hold_the_models_tensors_is_refused_by_file(copied, change, said):
    rewrite(copied, change)
    with pytest.raises(EvalError, match=f"model.safetensors .*{said}"):
        load(copied)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def litter(path):
    path.write_bytes(os.urandom(4000))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, litter, empty])
@pytest.mark.parametrize("layout", ["whole", "shards", "pickled", "index"])
def test_a_damaged_file_of_weights_is_named(copied, damage, layout):
    path = copied / "model.safetensors"
    if layout in ("shards", "index"):
        path = copied / split_in_two(copied)[1]
        path = copied / "model.safetensors.index.json" if layout == "index" else path
    elif layout == "pickled":
        tensors = load_file(path)
        path.unlink()
        path = copied / "pytorch_model.bin"
        torch.save(tensors, path)
    damage(path)
    with pytest.raises(EvalError, match=f"{path.name}.*download the checkpoint again") as caught:
        load(copied)
    assert str(caught.value).count("\n") == 0


def test_a_missing_shard_and_missing_weights_are_named(copied):
    second = split_in_two(copied)[1]
    (copied / second).unlink()
    with pytest.raises(EvalError, match=f"names 1 files that are not there \\({second}\\)"):
        load(copied)
    for path in copied.glob("model*"):
        path.unlink()
    with pytest.raises(EvalError, match="holds a config.json and no weights"):
        load(copied)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        lambda path: (path.unlink(), path.symlink_to("gone")),
    ],
)
def test_a_pointer_and_a_dangling_link_are_named(copied, damage):
    damage(copied / "model.safetensors")
    with pytest.raises(EvalError, match="model.safetensors.*(git lfs pull|link to nothing)"):
        load(copied)


@pytest.mark.parametrize("kind, made", [("a folder", os.mkdir), ("a pipe or a device", os.mkfifo)])
def test_weights_that_are_no_file_are_called_what_they_are(copied, kind, made):
    second = copied / split_in_two(copied)[1]
    for path in (second, copied / "model.safetensors"):
        path.unlink(missing_ok=True)
        made(path)
        with pytest.raises(EvalError, match=f"{path.name} is {kind}, and weights are a file"):
            load(copied)


@pytest.mark.parametrize(
    "part, key, count",
    [("text_config", "num_hidden_layers", 10**7), ("vision_config", "num_hidden_layers", 1001)],
)
def test_more_layers_than_any_model_has_are_refused_before_they_are_built(copied, part, key, count):
    config = json.loads((copied / "config.json").read_text())
    config[part][key] = count
    (copied / "config.json").write_text(json.dumps(config))
    for door in (load_clip, load_preparation, lambda place: open_model(ModelConfig(place))):
        with pytest.raises(UserError, match=f"{part}.{key} {count}, and at most 1000"):
            door(str(copied))


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 7 bytes")],
)
def test_memory_that_runs_out_while_weights_are_read_is_one_sentence_with_the_cure(
    tiny_clip, monkeypatch, capsys, error
):
    from transformers import AutoModel

    def exhausted(*_, **__):
        raise error

    monkeypatch.setattr(AutoModel, "from_pretrained", exhausted)
    assert guarded(lambda: load_clip(str(tiny_clip)), debug=False, going_on="") == 2
    sentence = capsys.readouterr().err
    assert re.fullmatch(
        "error: this needs more memory or threads than there are .*; free some, .*\n", sentence
    )


def test_loading_shows_no_bar_of_the_library(tiny_clip, capfd):
    load(tiny_clip)
    assert "Loading weights" not in capfd.readouterr().err


def test_loading_a_model_that_could_be_split_between_processes_warns_of_nothing(small_vlm):
    """A level of its own on the library's logger makes it check the layers of such a plan."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    library = logging.getLogger("transformers")
    library.addHandler(handler)
    try:
        load_model(ModelConfig(str(small_vlm("qwen3_vl"))))
    finally:
        library.removeHandler(handler)
    assert not said


def test_a_shard_that_holds_nan_is_named(copied):
    names = split_in_two(copied)
    tensors = load_file(copied / names[1])
    next(value for value in tensors.values() if value.is_floating_point()).fill_(float("nan"))
    save_file(tensors, copied / names[1], {"format": "pt"})
    with pytest.raises(EvalError, match=f"{names[1]} holds NaN"):
        load(copied)


@pytest.mark.parametrize("names", [["../secret"], [3], [None]])
def test_an_index_names_files_of_its_folder_alone(copied, names):
    split_in_two(copied)
    (copied / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": name for name in names}})
    )
    with pytest.raises(EvalError, match="index.json is no index"):
        load(copied)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}])
def test_a_pickle_of_something_else_is_named_and_code_in_one_is_not_run(copied, content, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (copied / "model.safetensors").unlink()
    for held in (content, {"a": Code()}):
        torch.save(held, copied / "pytorch_model.bin")
        with pytest.raises(EvalError, match="pytorch_model.bin cannot be read"):
            load(copied)
    assert not (tmp_path / "ran").exists()


def test_a_base_with_an_adapter_in_its_folder_is_refused(copied):
    (copied / "adapter_config.json").write_text("{}")
    with pytest.raises(EvalError, match="holds an adapter"):
        load(copied)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 5000,
        b'{"model_type": 3}',
        b'{"model_type": "clip", "text_config": 5}',
    ],
)
def test_a_damaged_configuration_is_one_sentence(copied, content):
    from llava_keeplora_eval.models import load_clip

    (copied / "config.json").write_bytes(content)
    with pytest.raises(EvalError, match="model"):
        load_clip(str(copied))


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_a_damaged_processor_is_one_sentence(copied, name):
    from llava_keeplora_eval.models import load_clip

    truncate(copied / name)
    with pytest.raises(EvalError, match="cannot be loaded"):
        load_clip(str(copied))


def test_training_refuses_the_same_bases(copied):
    from llava_keeplora.config import ModelConfig
    from llava_keeplora.models import load_model

    rewrite(copied, drop_layer)
    with pytest.raises(EvalError, match="lacks 32 of the model's tensors"):
        load_model(ModelConfig(str(copied)))


def test_the_record_of_a_checkpoint_changes_with_weights_configuration_processor_and_template_alone(
    copied, tiny_clip
):
    record = model_content(str(copied))
    assert record == model_content(str(tiny_clip)), "a copy is the same model"
    (copied / "README.md").write_text("a model")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(
        json.dumps(config | {"transformers_version": "4.0.0", "_name_or_path": "elsewhere"})
    )
    assert model_content(str(copied)) == record
    for part, change in {
        "weights": lambda: rewrite(copied, lambda tensors: tensors["logit_scale"].add_(1e-3)),
        "config": lambda: (copied / "config.json").write_text(
            json.dumps(config | {"logit_scale_init_value": 1.5})
        ),
        "processor": lambda: (copied / "chat_template.jinja").write_text("{{ messages }}"),
        "stops": lambda: (copied / "generation_config.json").write_text('{"eos_token_id": 5}'),
    }.items():
        before = model_content(str(copied))
        change()
        assert content_changes(before, model_content(str(copied))) == [part]
    assert content_changes({"commit": "abc"}, model_content(str(copied))) is None, (
        "a commit and files cannot be compared"
    )
    assert content_changes({"commit": "abc"}, {"commit": "abd"}) == ["commit"]


def test_a_kept_hash_is_used_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_KEEPLORA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    old = time.time() - 100
    os.utime(path, (old, old))
    first = content_hash(path)
    (kept,) = (tmp_path / "cache/hashes").iterdir()
    kept.write_text("0" * 64)
    assert content_hash(path) == "0" * 64, "it is not read again"
    path.write_bytes(b"two")
    assert content_hash(path) not in (first, "0" * 64)
    kept.write_text("garbage")
    os.utime(path, (old, old))
    assert len(content_hash(path)) == 64


def whole_numbers(tensors):
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"].to(torch.int8)


def truths(tensors):
    tensors["logit_scale"] = tensors["logit_scale"] > 0


@pytest.mark.parametrize("change", [whole_numbers, truths])
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_that_are_no_floating_point_numbers_are_refused_instead_of_cast(copied, change, pickled):
    rewrite(copied, change)
    if pickled:
        torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
        (copied / "model.safetensors").unlink()
    with pytest.raises(EvalError, match="holds 1 tensors of whole or complex numbers.*quantised from"):
        load(copied)


def test_tensors_without_a_place_are_found_where_the_library_does_not_name_them(copied):
    """As with ZeRO-3, where a configuration of fewer layers would be loaded without a word."""
    from transformers import CLIPModel

    class Silent:
        @staticmethod
        def from_pretrained(*args, **options):
            model, info = CLIPModel.from_pretrained(*args, **options)
            return model, {**info, "unexpected_keys": set()}

    load_checked(Silent, str(copied))
    config = json.loads((copied / "config.json").read_text())
    fewer = config["vision_config"] | {"num_hidden_layers": config["vision_config"]["num_hidden_layers"] - 1}
    (copied / "config.json").write_text(json.dumps(config | {"vision_config": fewer}))
    with pytest.raises(EvalError, match="holds 16 tensors more than the model of its config.json has"):
        load_checked(Silent, str(copied))


def test_a_tensor_in_two_shards_is_refused(copied):
    names = split_in_two(copied)
    first, second = (load_file(copied / name) for name in names)
    save_file(
        second | {"logit_scale": torch.tensor(0.0)} | dict(list(first.items())[:1]),
        copied / names[1],
        {"format": "pt"},
    )
    with pytest.raises(EvalError, match=f"{names[1]} holds .* tensors that {names[0]} holds too"):
        load(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pickled", [False, True])
def test_values_that_quantising_would_hide_are_found_in_the_files(copied, value, pickled):
    rewrite(copied, lambda tensors: tensors["visual_projection.weight"].view(-1)[3:4].fill_(value))
    if pickled:
        torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
        (copied / "model.safetensors").unlink()
    with pytest.raises(
        EvalError,
        match=r"(model.safetensors|pytorch_model.bin) holds NaN or infinity \(in visual_projection.weight\)",
    ):
        check_values(str(copied))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_with_nan_is_refused_before_it_is_loaded(copied, kind):
    from llava_keeplora.config import ModelConfig
    from llava_keeplora.models import load_model

    rewrite(
        copied,
        lambda tensors: (
            tensors["text_model.encoder.layers.0.self_attn.q_proj.weight"].view(-1)[:1].fill_(float("nan"))
        ),
    )
    with pytest.raises(EvalError, match="NaN or infinity .*q_proj"):
        load_model(ModelConfig(str(copied), quantization=kind))


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "nothing"}]
)
def test_a_checkpoint_that_says_it_is_quantised_is_refused_by_both_programs(copied, quantization):
    from llava_keeplora.config import ModelConfig
    from llava_keeplora.errors import ConfigError
    from llava_keeplora.models import open_model
    from llava_keeplora_eval.models import load_clip

    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(EvalError, match="quantised already"):
        load_clip(str(copied))
    with pytest.raises(ConfigError, match="quantised already"):
        open_model(ModelConfig(str(copied)))


@pytest.mark.parametrize("names", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_tokenizer_without_words_is_refused_by_every_door(copied, names):
    from llava_keeplora.config import ModelConfig
    from llava_keeplora.models import open_model
    from llava_keeplora_eval.models import load_clip, load_preparation

    for name in names:
        (copied / name).unlink()
    for door in (
        lambda: load_clip(str(copied)),
        lambda: open_model(ModelConfig(str(copied))).processor,
        lambda: load_preparation(str(copied)),
    ):
        with pytest.raises(EvalError, match="has no words: its files|the backend tokenizer"):
            door()


def test_a_reason_of_one_line_says_what_is_wrong(copied):
    from llava_keeplora_eval.models import load_clip

    config = json.loads((copied / "config.json").read_text())
    for section, said in (
        ({"num_attention_heads": 3}, "hidden size"),
        ({"hidden_act": "sigh"}, "KeyError: 'sigh'"),
    ):
        (copied / "config.json").write_text(
            json.dumps(config | {"vision_config": config["vision_config"] | section})
        )
        with pytest.raises(EvalError, match=said):
            load_clip(str(copied))
