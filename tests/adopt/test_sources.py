"""What an adapter or a checkpoint must be to be taken over, and what it is read as."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava_keeplora.adapters import Delta, FullDelta, project_off
from llava_keeplora.adapters.project import squared_distance, squared_norm
from llava_keeplora.adopt import find_source, read_update
from llava_keeplora.adopt.checkpoint import low_rank
from llava_keeplora.adopt.peft_adapter import read_adapter
from llava_keeplora.config import ModelConfig
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.saved_run import base_content, base_record, extended


@pytest.fixture(scope="session")
def layers(tiny_clip):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(tiny_clip)
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.fixture(scope="session")
def plain(peft_adapter, tmp_path_factory):
    return peft_adapter(tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture
def adapter(plain, tmp_path):
    """A copy of an adapter, to be spoilt."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def change_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora to 'True'.*merge_and_unload"),
        ({"bias": "all"}, "bias to 'all'"),
        ({"modules_to_save": ["visual_projection"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"something_newer": {"on": True}}, "something_newer"),
        ({"peft_type": "IA3"}, "type 'IA3'"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changed the base.*path_initial_model"),
        ({"r": 4}, "has rank 2 in '.*', where adapter_config.json says 4"),
        ({"lora_alpha": 0}, "no number above 0"),
        ({"rank_pattern": [2]}, "rank_pattern that is no object"),
    ],
)
def test_what_s_b_a_cannot_express_is_refused_by_its_key(adapter, layers, changes, message):
    change_config(adapter, **changes)
    with pytest.raises(RunError, match=message):
        read_adapter(adapter, layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "lacks lora_B of 'vision_model.encoder.layers.0"),
        (lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")), "lora_A of .* that are not finite"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(2, 7)}), r"shape \(2, 7\).* 32 × 32"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(0)}), r"shape \(0,\)"),
        (
            lambda t: t.update({f"{Q}.bias": torch.zeros(2)}),
            "'.*q_proj.bias', which is no linear layer's LoRA",
        ),
        (lambda t: t.update({"base_model.model.x.lora_embedding_A": torch.zeros(2)}), "lora_embedding_A"),
        (
            lambda t: t.update({"base_model.model.blocks.0.lora_A.weight": torch.zeros(2, 4)}),
            "adapts 'blocks.0'",
        ),
        (lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k], "every B is zero"),
    ],
)
def test_tensors_that_are_no_lora_of_the_model_are_refused(adapter, layers, change, message):
    change_tensors(adapter, change)
    with pytest.raises(RunError, match=message):
        read_adapter(adapter, layers)


def test_half_written_and_missing_files_are_refused(adapter, tmp_path, one_task_run):
    (adapter / "adapter_config.json").rename(tmp_path / "config")
    with pytest.raises(RunError, match=r"holds no adapter_config.json"):
        find_source(str(adapter))
    (adapter / "adapter_config.json").write_text('{"peft_type": "LO')
    with pytest.raises(RunError, match="adapter_config.json cannot be read"):
        find_source(str(adapter))
    shutil.copy(tmp_path / "config", adapter / "adapter_config.json")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(RunError, match="cannot be read as safetensors"):
        read_adapter(adapter, {})
    weights.unlink()
    with pytest.raises(RunError, match="holds no adapter_model.safetensors"):
        find_source(str(adapter))
    with pytest.raises(RunError, match="is a run folder; export what it learned"):
        find_source(str(one_task_run))
    with pytest.raises(RunError, match="neither a PEFT adapter .* nor a checkpoint"):
        find_source(str(tmp_path))


def test_names_of_another_version_of_transformers_are_the_same_layers(tmp_path):
    layers = {
        "model.language_model.layers.0.self_attn.q_proj": nn.Linear(4, 4),
        "model.vision_tower.encoder.layers.0.mlp.fc1": nn.Linear(4, 4),
    }
    old = [
        "language_model.model.layers.0.self_attn.q_proj",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
    ]
    tensors = {
        f"base_model.model.{name}.lora_{factor}.weight": torch.ones(*shape)
        for name in old
        for factor, shape in (("A", (1, 4)), ("B", (4, 1)))
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    assert read_adapter(tmp_path, layers).keys() == layers.keys()


def test_an_adapter_of_another_base_is_refused_and_one_of_a_copy_is_not(adapter, layers, tiny_clip, tmp_path):
    model = ModelConfig(name_or_path=str(tiny_clip))
    base = base_record(model, base_content(model))
    family = SimpleNamespace(model=SimpleNamespace(named_modules=layers.items))
    read = lambda: read_update(find_source(str(adapter)), model, base, family)  # noqa: E731
    copy = Path(shutil.copytree(tiny_clip, tmp_path / "copy"))
    change_config(adapter, base_model_name_or_path=str(copy))
    assert len(read().deltas) == 16
    tensors = load_file(copy / "model.safetensors")
    save_file({k: v + 0.01 for k, v in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        RunError, match="was trained on the base '.*copy', and the run's base is.*weights differ"
    ):
        read()
    change_config(adapter, base_model_name_or_path="somebody/model")
    assert len(read().deltas) == 16, "a name on the Hub against a folder cannot be compared"
    with pytest.raises(RunError, match="'somebody/model', and the run's base is 'other/model'"):
        read_update(find_source(str(adapter)), ModelConfig(name_or_path="other/model"), base, family)


def test_a_refused_adapter_leaves_the_run_as_it_was(one_task_run, tiny_tasks, adapter, driven, tmp_path):
    run = Path(shutil.copytree(one_task_run, tmp_path / "run"))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    change_tensors(
        adapter,
        lambda t: t.update(
            {
                "base_model.model.visual_projection.lora_A.weight": torch.ones(2, 32),
                "base_model.model.visual_projection.lora_B.weight": torch.ones(16, 2),
            }
        ),
    )
    with pytest.raises(
        RunError, match="changes 1 modules that 'keeplora' does not train .*'visual_projection.weight'"
    ):
        driven(extended(run, str(tiny_tasks[1]), source=str(adapter)))
    state = load_file(run / "keeplora/task-00-base/state.safetensors")

    def inside(tensors):
        for key in [key for key in tensors if "visual_projection" in key]:
            del tensors[key]
        for name, M in state.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = M[:, :2].T.contiguous()

    change_tensors(adapter, inside)
    with pytest.raises(RunError, match="nothing of .* is outside of what 'keeplora' protects"):
        driven(extended(run, str(tiny_tasks[1]), source=str(adapter)))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_a_method_that_needs_more_than_an_update_refuses(run_config, tiny_tasks, adapter, tmp_path):
    changes = {"tasks": [str(tiny_tasks[0])], "adopted": [str(adapter)], "methods": {"keeplora+": {}}}
    with pytest.raises(ConfigError, match=r"'keeplora\+' cannot take over task 'colours'.*seq-lora"):
        run_config(tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match="adopted lists 1 sources for 3 tasks"):
        run_config(tmp_path / "run", adopted=[str(adapter)])


# --- the algebra -------------------------------------------------------------------------------------------


def test_a_projection_equals_the_dense_one_and_drops_directions_that_vanish():
    generator = torch.Generator().manual_seed(0)
    M = torch.linalg.qr(torch.randn(8, 3, generator=generator, dtype=torch.float64)).Q
    A, B = (torch.randn(4, 8, generator=generator), torch.randn(6, 4, generator=generator))
    A[1] = M[:, 0].float()
    delta = Delta(A, B, 0.5)
    dense = 0.5 * B.double() @ A.double()
    expected = dense - dense @ M @ M.T
    low, full = project_off(delta, M), project_off(FullDelta({"weight": dense.float()}), M)
    assert low.A.shape[0] == 3
    for projected in (low, full):
        torch.testing.assert_close(projected.dense().double(), expected, atol=1e-6, rtol=0)
    assert squared_norm(delta) == pytest.approx(float(dense.square().sum()), rel=1e-6)
    lost = float((dense @ M).square().sum())
    assert squared_distance(delta, low) == pytest.approx(lost, rel=1e-5)
    assert squared_distance(FullDelta({"weight": dense.float()}), full) == pytest.approx(lost, rel=1e-5)
    assert project_off(Delta(M.T.float(), torch.ones(6, 3), 1.0), M) is None


def test_a_difference_is_low_rank_only_if_it_is_so_to_rounding():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(40, 30, generator=generator)
    B, A = torch.randn(40, 3, generator=generator), torch.randn(3, 30, generator=generator)
    merged = W + 0.1 * B @ A
    found = low_rank(merged.double() - W.double(), merged)
    assert len(found.A) == 3
    torch.testing.assert_close(found.dense(), 0.1 * B @ A, atol=1e-5, rtol=0)
    assert low_rank(torch.randn(40, 30, generator=generator), merged) is None
    half = merged.bfloat16().float()
    assert low_rank(half.double() - W.double(), half) is None, "bfloat16 rounds to full rank"
