"""The identities of KeepLoRA++: a factor per block, in training, in what is left behind and in every export alike."""

import json

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import CLIPModel

from llava_keeplora.adapters import load_deltas
from llava_keeplora.config import parse_config
from llava_keeplora.errors import MethodError
from llava_keeplora.export import export_run, verify
from llava_keeplora.methods import METHODS
from llava_keeplora.methods.keeplora_plus_plus import block_factors
from shorter_runs import reload_here

Options = METHODS["keeplora++"].Options
STEP = {"training": {"max_steps": 1}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_config, driven, tiny_tasks):
    methods = {
        "keeplora": {},
        "keeplora++": {},
        "flat": {"method": "keeplora++", "gamma": 1.0},
        "none": {"method": "keeplora++", "gamma": 0.0},
        "keeplora-step": {"method": "keeplora", **STEP},
        "step": {"method": "keeplora++", **STEP},
        "literal": {"method": "keeplora++", "form": "literal", **STEP},
    }
    return driven(
        run_config(
            tmp_path_factory.mktemp("plus-plus") / "run",
            methods=methods,
            tasks=[str(path) for path in tiny_tasks[:2]],
        )
    )


def tasks(run, label):
    return [path for path in sorted((run / label).glob("task-*")) if not path.name.startswith("task-00")]


def deltas(run, label):
    return [load_deltas(path / "delta.safetensors") for path in tasks(run, label)]


def expected_factor(name):
    """The tiny CLIP has two blocks per encoder."""
    return 0.2 if name.startswith("vision_model.encoder.layers.0.") else 1.0


@pytest.mark.slow
def test_a_gamma_of_one_is_keeplora_bit_for_bit(finished):
    files = [
        path
        for path in sorted((finished / "keeplora").rglob("*"))
        if path.suffix in (".safetensors", ".jsonl") and path.name != "journal.jsonl"
    ]
    assert len(files) > 2 * 5
    for path in files:
        assert (
            finished / "flat" / path.relative_to(finished / "keeplora")
        ).read_bytes() == path.read_bytes(), path


def test_the_factor_is_gamma_in_the_first_vision_block_one_in_the_last_and_one_in_the_text_encoder(finished):
    for ours, theirs in zip(deltas(finished, "keeplora++"), deltas(finished, "keeplora"), strict=True):
        assert ours.keys() == theirs.keys()
        for name, delta in ours.items():
            assert delta.scale == pytest.approx(expected_factor(name) * theirs[name].scale)


def test_the_first_tasks_A_does_not_depend_on_gamma(finished):
    ours, theirs = (
        tasks(finished, label)[0] / "adapters.safetensors" for label in ("keeplora++", "keeplora")
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_one_step_of_adam_moves_a_layer_by_its_factor_times_what_keeplora_does(finished):
    """B starts at 0, so that both see the same gradient but for its scale, which Adam doesn't see."""
    ours, theirs = deltas(finished, "step")[0], deltas(finished, "keeplora-step")[0]
    for name, delta in ours.items():
        expected = expected_factor(name) * theirs[name].dense()
        assert float((delta.dense() - expected).norm()) < 1e-2 * float(expected.norm()), name


def test_the_literal_form_takes_the_factor_too_so_that_training_begins_where_the_last_task_ended(finished):
    """Without the factor in W', the first step would begin elsewhere and move otherwise than that from zero."""
    for ours, theirs in zip(deltas(finished, "literal")[:1], deltas(finished, "step")[:1], strict=True):
        for name, delta in ours.items():
            assert delta.scale == theirs[name].scale
            assert float((delta.dense() - theirs[name].dense()).norm()) < 1e-2 * float(
                delta.dense().norm()
            ), name


def test_a_gamma_of_zero_leaves_the_first_block_out_and_says_so(finished):
    first = [name for name in deltas(finished, "keeplora")[0] if expected_factor(name) < 1.0]
    assert len(first) == 4
    for path, delta in zip(tasks(finished, "none"), deltas(finished, "none"), strict=True):
        assert not set(first) & delta.keys() and len(delta) == 12
        assert json.loads((path / "prepared.json").read_text())["report"]["left_out"] == dict.fromkeys(
            first, "its block's factor is 0"
        )


def test_llava_scales_the_language_model_and_not_the_tower(llava_tree, driven, mixed_tasks, tmp_path):
    tree = llava_tree(tmp_path / "run", tasks=[str(mixed_tasks[0])], methods={"keeplora++": STEP})
    (delta,) = deltas(driven(parse_config(tree)), "keeplora++")
    low = [delta for name, delta in delta.items() if name.startswith("model.language_model.layers.0.")]
    high = [
        one
        for name, one in delta.items()
        if ".vision_tower." in name or name.startswith("model.language_model.layers.1.")
    ]
    assert len(low) == 7 and len(high) > 7
    assert {one.scale for one in low} == {0.2} and {one.scale for one in high} == {1.0}


def test_an_exported_adapter_holds_the_factors_though_its_scale_is_one_for_all_layers(
    finished, tiny_clip, tmp_path, monkeypatch
):
    monkeypatch.setattr(verify, "verify_in_fresh_process", reload_here)
    folder = export_run(
        finished, "adapter", tmp_path / "adapter", label="keeplora++", base_id="you/base", with_state=False
    ).folder
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and "alpha_pattern" not in config
    merged = PeftModel.from_pretrained(CLIPModel.from_pretrained(tiny_clip), folder).merge_and_unload()
    changes = deltas(finished, "keeplora++")
    for name, module in CLIPModel.from_pretrained(tiny_clip).named_modules():
        if isinstance(module, nn.Linear):
            change = sum((task[name].dense() for task in changes if name in task), torch.zeros(()))
            torch.testing.assert_close(
                merged.get_submodule(name).weight, module.weight + change, rtol=0, atol=1e-6
            )


# --- the factor alone ----------------------------------------------------------------------------


def test_the_factor_rises_evenly_from_the_first_block_that_is_adapted():
    names = [f"vision_model.encoder.layers.{block}.self_attn.q_proj" for block in (11, 4, 5, 7)]
    assert list(block_factors(names, 0.3).values()) == pytest.approx([1.0, 0.3, 0.4, 0.6])
    assert block_factors(names, 1.0) == dict.fromkeys(names, 1.0)


def test_one_block_alone_is_keeploras():
    names = [f"model.language_model.layers.3.mlp.{leaf}_proj" for leaf in ("up", "down")]
    assert block_factors(names, 0.2) == dict.fromkeys(names, 1.0) and block_factors([], 0.2) == {}


def test_layers_outside_of_blocks_have_no_factor_and_other_numbers_in_a_name_are_no_block():
    names = ["0.vision_model.encoder.layers.2.mlp.1", "0.vision_model.encoder.layers.4.mlp.1"]
    others = ["vision_model.head.mlp.fc1", "vision_model.head.attention.out_proj"]
    assert block_factors(names + others, 0.2) == pytest.approx(dict(zip(names, [0.2, 1.0])))
    assert block_factors(["visual.blocks.0.qkv", "visual.blocks.1.qkv"], 0.5)["visual.blocks.0.qkv"] == 0.5


@pytest.mark.parametrize("gamma", [-0.1, 1.5, float("nan")])
def test_a_gamma_that_is_no_share_is_refused(gamma):
    with pytest.raises(
        MethodError,
        match=rf"gamma must be in \[0, 1\] .got {gamma}.; set it to 0.2",
    ):
        Options(gamma=gamma)


def test_keeploras_settings_and_refusals_are_there():
    assert Options(form="literal", preset="released-clip").gamma == 0.2
    with pytest.raises(MethodError, match="gradient_fraction must be in .*got 0.0"):
        Options(gradient_fraction=0.0)
