"""An exported adapter is an ordinary LoRA of the original base, as PEFT, transformers and vLLM load one."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, CLIPModel

from llava_keeplora import cli
from llava_keeplora.adapters import Delta, load_deltas
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.export import export_run, run_export, verify
from llava_keeplora.export.adapter import check_weights, combine, exclusion, vllm_rank
from llava_keeplora_eval.encoders import CLIP

PARTS = {
    "clip": CLIP.parts,
    "llava": {
        "vision": "model.vision_tower.encoder.layers",
        "connector": "model.multi_modal_projector",
        "language": "model.language_model.layers",
    },
}
LEAVES = {
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "out_proj",
    "fc1",
    "fc2",
    "linear_1",
    "linear_2",
}


def deltas_of(run, tasks=3):
    paths = sorted((run / "keeplora").glob("task-*/delta.safetensors"))
    return [load_deltas(path) for path in paths[:tasks]]


def layer_of(key):
    return re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key).group(1)


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f != "clip")) for f in PARTS])
def test_the_product_of_every_layer_is_the_sum_of_the_tasks_deltas(family, exported, finished):
    folder, _ = exported(family)
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    tasks = deltas_of(finished(family))
    assert {layer_of(key) for key in tensors} == {name for task in tasks for name in task}
    for name in {layer_of(key) for key in tensors}:
        A, B = (tensors[f"base_model.model.{name}.lora_{key}.weight"].double() for key in "AB")
        exact = sum(
            task[name].scale * task[name].B.double() @ task[name].A.double() for task in tasks if name in task
        )
        torch.testing.assert_close(config["lora_alpha"] / config["r"] * (B @ A), exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize("family", PARTS)
def test_peft_and_transformers_load_it_onto_the_original_base_and_adapt_the_same_layers(
    family, exported, finished, tiny_clip, tiny_llava
):
    folder, done = exported(family)
    base = (
        CLIPModel.from_pretrained(tiny_clip)
        if family == "clip"
        else AutoModelForImageTextToText.from_pretrained(tiny_llava)
    )
    plain = {
        name: module.weight.detach().clone()
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
    }
    loaded = PeftModel.from_pretrained(base, folder)
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in loaded.named_modules()
        if isinstance(module, LoraLayer)
    }
    tasks = deltas_of(finished(family))
    assert adapted == {name for task in tasks for name in task} and len(adapted) == len(done.adapter.layers)
    merged = loaded.merge_and_unload()
    for name, module in merged.named_modules():
        if isinstance(module, nn.Linear):
            change = sum((task[name].dense() for task in tasks if name in task), torch.zeros(()))
            torch.testing.assert_close(module.weight.detach(), plain[name] + change, rtol=0, atol=1e-6)
    # Both ways of loading and the comparison of logits were gone through in a process of their own.
    assert done.reloaded.largest < 1e-4 and done.own.same == 1.0 and done.examples == 8
    assert 0 < done.bfloat16.relative < 0.05


@pytest.mark.parametrize("family", PARTS)
def test_vllms_loader_would_take_it(family, exported):
    """The rules of vllm/lora/peft_helper.py and lora_model.py, and the values of vllm/config/lora.py, as told in its documentation."""
    folder, done = exported(family)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["bias"] == "none" and config["modules_to_save"] is None and not config["use_dora"]
    assert not {"rank_pattern", "alpha_pattern"} & config.keys() and config["lora_alpha"] == config["r"]
    assert isinstance(config["target_modules"], list) and set(config["target_modules"]) <= LEAVES
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, value in tensors.items():
        assert layer_of(key).rsplit(".", 1)[-1] in config["target_modules"]
        assert value.shape[0 if ".lora_A." in key else 1] == config["r"] and value.dtype == torch.float32
    assert {key.replace("lora_A", "lora_B") for key in tensors if "lora_A" in key} == {
        key for key in tensors if "lora_B" in key
    }
    assert config["r"] <= vllm_rank(config["r"]) <= 512


def test_the_rank_given_to_vllm_is_one_that_it_takes():
    assert [vllm_rank(rank) for rank in (1, 2, 16, 17, 257, 512)] == [1, 8, 16, 32, 320, 512] and vllm_rank(
        513
    ) is None


def test_layers_of_fewer_directions_and_tasks_without_a_layer_are_filled_with_zeros_exactly():
    def delta(rank, scale=1.0, width=6):
        return Delta(torch.randn(rank, width), torch.randn(5, rank), scale)

    torch.manual_seed(0)
    tasks = [{"a": delta(2, 0.5), "b": delta(1)}, {"a": delta(3, 2.0)}, {"c": delta(2)}]
    found = combine(tasks)
    assert found.rank == 5 and {len(one.A) for one in found.layers.values()} == {5} and found.error == 0
    for name, one in found.layers.items():
        exact = sum(
            task[name].scale * task[name].B.double() @ task[name].A.double() for task in tasks if name in task
        )
        torch.testing.assert_close((one.B.double() @ one.A.double()), exact, rtol=0, atol=1e-5)


def test_a_compressed_adapter_is_the_truncated_svd_and_says_what_it_lost():
    torch.manual_seed(0)
    tasks = [{name: Delta(torch.randn(3, 8), torch.randn(6, 3), 0.7) for name in "ab"} for _ in range(2)]
    found, dense = (
        combine(tasks, 2),
        {name: sum(task[name].dense() for task in tasks).double() for name in "ab"},
    )
    best = {name: torch.linalg.svd(value) for name, value in dense.items()}
    lost = {name: S[2:].square().sum() for name, (_, S, _) in best.items()}
    for name, (U, S, Vh) in best.items():
        torch.testing.assert_close(
            found.layers[name].dense().double(), U[:, :2] * S[:2] @ Vh[:2], rtol=0, atol=1e-5
        )
    whole = {name: value.square().sum() for name, value in dense.items()}
    assert found.error == pytest.approx(float((sum(lost.values()) / sum(whole.values())).sqrt()), rel=1e-5)
    assert found.worst == pytest.approx(
        float(max(lost[name] / whole[name] for name in "ab").sqrt()), rel=1e-5
    )
    assert combine(tasks, 99).error == pytest.approx(0, abs=1e-6) and combine(tasks, 99).rank == 6


#: Layers of LLaVA's language model and CLIP tower as transformers 5 and 4 call them.
ERAS = {
    "5": ("model.vision_tower.encoder.layers", "model.language_model.layers", "model.multi_modal_projector"),
    "4": ("vision_tower.vision_model.encoder.layers", "language_model.model.layers", "multi_modal_projector"),
}


def names(era):
    vision, language, projector = ERAS[era]
    layers = [f"{vision}.{i}.self_attn.q_proj" for i in (1, 2, 12)] + [
        f"{language}.{i}.self_attn.q_proj" for i in (1, 2, 12)
    ]
    return [*layers, f"{projector}.linear_1", f"{projector}.linear_2"]


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("left_out", [(0, 1, 2), (2,), (1, 5), (0, 1, 2, 6), (6,)])
def test_layers_with_a_targets_name_and_no_adapter_are_excluded_in_both_naming_eras(era, left_out):
    new = names("5")
    regex = exclusion([new[i] for i in left_out], new, PARTS["llava"])
    config = LoraConfig(target_modules=["q_proj", "linear_1", "linear_2"], exclude_modules=regex)
    assert [i for i, name in enumerate(names(era)) if not check_target_module_exists(config, name)] == list(
        left_out
    )
    assert exclusion([], new, PARTS["llava"]) is None


def test_parts_task_and_rank_choose_what_is_exported_and_the_card_says_what_is_missing(
    finished, tmp_path, quick_reload
):
    run = finished("plain")
    done = export_run(
        run,
        "adapter",
        tmp_path / "small",
        at_task=2,
        parts=["language"],
        rank=2,
        base_id="you/base",
        with_state=False,
    )
    assert (
        done.tasks == 2
        and done.adapter.rank == 2
        and done.compressed
        and 0 < done.adapter.error <= done.adapter.worst < 1
    )
    assert done.left_out == ["vision", "connector"] and all(
        "language_model" in name for name in done.adapter.layers
    )
    tasks = deltas_of(run, 2)
    for name, one in done.adapter.layers.items():
        S = torch.linalg.svdvals(sum(task[name].dense() for task in tasks))
        torch.testing.assert_close(torch.linalg.svdvals(one.dense())[:2], S[:2], rtol=1e-3, atol=1e-6)
    card = (tmp_path / "small" / "README.md").read_text()
    assert (
        "Left out, though the run trained them: vision, connector" in card
        and "compressed with a relative error of" in card
    )
    assert "--max-lora-rank 8 --lora-modules" in card and "llava-keeplora import" not in card
    assert not (tmp_path / "small" / "keeplora_state").exists()
    assert "compressed: " in done.describe() and "in the worst layer" in done.describe()


def test_what_an_adapter_cannot_hold_exactly_is_refused_with_the_cure(finished, tmp_path):
    def refused(**options):
        with pytest.raises(ConfigError) as error:
            export_run(finished("plain"), "adapter", tmp_path / "new", **{"base_id": "you/base"} | options)
        assert not (tmp_path / "new").exists()
        return str(error.value)

    assert refused() == (
        "2 layers have updates of full rank, which no LoRA adapter holds exactly (first model.multi_modal_projector.linear_1); "
        "leave their part out with --parts, or export --as merged."
    )
    assert (
        "a folder of this machine, which nobody else can load; give its id on the Hub with --base-id"
        in refused(base_id=None, parts=["language"])
    )
    assert "--base-id is '/tmp/base', which is no id on the Hub" in refused(base_id="/tmp/base")
    assert "--parts names 'languages', which 'keeplora' did not change; did you mean 'language'" in refused(
        parts=["languages"]
    )
    assert "--rank is 0, but an adapter has at least one direction" in refused(parts=["language"], rank=0)


def test_parts_are_listed_with_commas_on_the_command_line(finished, capsys):
    arguments = ["export", str(finished("plain")), "--as", "adapter", "--base-id", "you/base", "--parts"]
    assert cli.main([*arguments, "language,text"]) == 2
    assert "error: --parts names 'text', which 'keeplora' did not change; " in capsys.readouterr().err
    assert cli.main([*arguments, "language,connector"]) == 2
    assert "error: 2 layers have updates of full rank" in capsys.readouterr().err


def test_a_task_that_is_not_finished_is_refused(finished, tmp_path):
    for task in (0, 4):
        with pytest.raises(
            RunError,
            match=f"has finished 3 tasks, and task {task} is asked for; choose 1 to 3 with --at-task",
        ):
            export_run(finished("plain"), "merged", tmp_path / "new", at_task=task, base_id="you/base")


def test_a_method_that_does_not_merge_is_exported_as_a_state_alone(finished, tmp_path, monkeypatch):
    import dataclasses

    from llava_keeplora.methods import METHODS

    method = METHODS["keeplora"]
    monkeypatch.setattr(method, "info", dataclasses.replace(method.info, mergeable=False))
    with pytest.raises(ConfigError, match="does not merge into the base's weights; export --as state"):
        export_run(finished("clip"), "adapter", tmp_path / "new", base_id="you/base")


@pytest.mark.parametrize(
    ("value", "words"),
    [(torch.zeros(4, 2), "is zero, so its layer learned nothing"), (torch.zeros(4, 0), "holds no numbers")],
)
def test_a_layer_that_learned_nothing_or_lost_its_numbers_is_refused(value, words, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    save_file(
        {
            "base_model.model.a.lora_A.weight": torch.ones(2, 4),
            "base_model.model.a.lora_B.weight": torch.ones(4, 2),
        },
        path,
    )
    check_weights(path)
    save_file(
        {"base_model.model.a.lora_A.weight": torch.ones(2, 4), "base_model.model.a.lora_B.weight": value},
        path,
    )
    with pytest.raises(
        RunError, match=f"'base_model.model.a.lora_B.weight' of adapter_model.safetensors {words}"
    ):
        check_weights(path)


def test_an_adapter_that_loads_as_something_else_is_refused_and_nothing_stays(
    finished, tmp_path, monkeypatch, quick_reload
):
    write = run_export.write_adapter

    def spoilt(change):
        def write_spoilt(folder, *arguments):
            write(folder, *arguments)
            change(Path(folder))

        return write_spoilt

    def doubled(folder):
        path = folder / "adapter_model.safetensors"
        save_file(
            {key: 2 * value if "lora_B" in key else value for key, value in load_file(path).items()},
            path,
            {"format": "pt"},
        )

    def fewer_targets(folder):
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"target_modules": config["target_modules"][1:]}))

    for change, words in (
        (doubled, "gives other logits after loading"),
        (fewer_targets, "layers are adapted after loading, where 16 were written"),
    ):
        monkeypatch.setattr(run_export, "write_adapter", spoilt(change))
        with pytest.raises(RunError, match=words):
            export_run(finished("clip"), "adapter", tmp_path / "new", base_id="you/base")
    assert list(tmp_path.iterdir()) == []


def test_the_deviation_compares_positions_and_choices():
    found, expected = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, 2.5], [0.0, 3.0]])
    deviation = verify.Deviation.between(found, expected)
    assert (deviation.largest, deviation.same) == (3.0, 0.5)
    assert deviation.relative == pytest.approx((0.25 + 9 + 9) ** 0.5 / (1 + 6.25 + 9) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_every_family_of_llava_is_exported(
    kind, form, make_llava, llava_tree, tmp_path, quick_reload, monkeypatch
):
    from llava_keeplora.config import parse_config
    from llava_keeplora.sequence import runner

    monkeypatch.setattr(runner, "write_run_report", lambda root: None)
    base = make_llava(tmp_path / "base", kind)
    runner.run(
        parse_config(
            llava_tree(tmp_path / "run", model={"name_or_path": str(base)}, parts={"connector": None})
        )
    )
    done = export_run(tmp_path / "run", form, base_id="you/base")
    assert done.folder == tmp_path / "run/export" / form and done.reloaded.largest < 1e-5


def test_an_export_whose_fresh_process_fails_is_refused(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(verify.sys, "executable", "false")
    with pytest.raises(
        RunError, match="the adapter cannot be loaded again .no reason given.; mend that and export again"
    ):
        export_run(finished("clip"), "adapter", tmp_path / "new", base_id="you/base")
    assert not (tmp_path / "new").exists()
