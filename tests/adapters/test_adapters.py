"""PEFT adapters on named layers, and the deltas that a task leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_keeplora.adapters import (
    AdapterInit,
    BaseWeights,
    Delta,
    FullDelta,
    attach,
    detach,
    load_deltas,
    read_adapters,
    save_deltas,
)
from llava_keeplora.files import read_tensors, write_tensors


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.other_q_proj, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.other_q_proj(torch.tanh(self.q_proj(x)))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def random_delta(out=6, width=6, rank=2, scale=0.5):
    return Delta(torch.randn(rank, width), torch.randn(out, rank), scale)


def test_only_the_named_layers_are_adapted_although_another_name_ends_alike(net):
    wrapper = attach(net, {"q_proj": AdapterInit(2, 2.0)})

    assert set(read_adapters(net)) == {"q_proj"}
    detach(wrapper)
    assert type(net.q_proj) is nn.Linear and not read_adapters(net)


def test_each_layer_keeps_its_own_rank_and_scale(net):
    attach(
        net, {"q_proj": AdapterInit(2, 2.0), "other_q_proj": AdapterInit(3, 6.0), "out": AdapterInit(2, 1.0)}
    )

    adapters = read_adapters(net)
    assert {n: (d.A.shape[0], d.scale) for n, d in adapters.items()} == {
        "q_proj": (2, 1.0),
        "other_q_proj": (3, 2.0),
        "out": (2, 0.5),
    }


def test_a_frozen_A_stays_frozen_when_peft_sets_the_adapter_again(net):
    A = torch.randn(2, 6)
    wrapper = attach(net, {"q_proj": AdapterInit(2, 2.0, A=A)})
    wrapper.set_adapter("default")

    assert [n for n, p in wrapper.named_parameters() if p.requires_grad] == [
        "base_model.model.q_proj.lora_B.default.weight"
    ]
    torch.testing.assert_close(read_adapters(net)["q_proj"].A, A)


def test_attaching_and_detaching_leaves_the_base_bitwise_unchanged(net):
    before = {n: p.clone() for n, p in net.named_parameters()}
    wrapper = attach(net, {"q_proj": AdapterInit(2, 2.0, B=torch.ones(6, 2)), "out": AdapterInit(2, 2.0)})
    detach(wrapper)

    assert all(torch.equal(before[n], p) for n, p in net.named_parameters())


def test_the_merged_weights_compute_what_the_adapter_computes(net):
    x = torch.randn(5, 6)
    base = BaseWeights({"q_proj": net.q_proj})
    delta = random_delta()
    wrapper = attach(net, {"q_proj": AdapterInit(2, 1.0, A=delta.A, B=delta.B)})
    with_adapter = net(x)
    detach(wrapper)
    base.apply([{"q_proj": delta}])

    torch.testing.assert_close(net(x), with_adapter, atol=1e-6, rtol=1e-5)


def test_the_weights_are_rebuilt_from_the_base_every_time_so_that_nothing_accumulates(net):
    base = BaseWeights({"q_proj": net.q_proj})
    first, second = {"q_proj": random_delta()}, {"q_proj": random_delta()}
    original = net.q_proj.weight.clone()
    for _ in range(3):
        base.apply([first, second])
    torch.testing.assert_close(
        net.q_proj.weight, original + first["q_proj"].dense() + second["q_proj"].dense()
    )
    base.apply([])
    assert torch.equal(net.q_proj.weight, original)


def test_a_bf16_model_is_rounded_once_from_the_exact_sum(net):
    net = net.to(torch.bfloat16)
    base = BaseWeights({"q_proj": net.q_proj})
    tasks = [{"q_proj": random_delta(scale=0.01)} for _ in range(20)]
    exact = net.q_proj.weight.detach().float() + sum(t["q_proj"].dense() for t in tasks)
    base.apply(tasks)
    assert float((net.q_proj.weight.float() - exact).abs().max()) <= float(exact.abs().max()) * 2**-8


def test_deltas_come_back_from_disk_bit_for_bit(tmp_path):
    deltas = {"a.b": random_delta(scale=1 / 3), "c": random_delta(out=4, rank=3)}
    save_deltas(tmp_path / "delta.safetensors", deltas)
    loaded = load_deltas(tmp_path / "delta.safetensors")

    assert loaded.keys() == deltas.keys()
    for name, delta in deltas.items():
        assert (
            torch.equal(loaded[name].A, delta.A)
            and torch.equal(loaded[name].B, delta.B)
            and loaded[name].scale == delta.scale
        )


# --- modules that are trained themselves ---------------------------------------------------------


class Patches(nn.Module):
    """Modules of every kind, and a parameter of its own, as a vision transformer has them."""

    def __init__(self):
        super().__init__()
        self.patch, self.position = nn.Conv2d(3, 4, 2, bias=False), nn.Embedding(5, 4)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 2)
        self.token = nn.Parameter(torch.randn(4))


def full_delta(module):
    return FullDelta({name: torch.randn_like(p) for name, p in module.named_parameters(recurse=False)})


def test_changes_of_any_module_come_back_from_disk_and_are_added_to_its_own_parameters(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"inside": Patches()})
    modules = {
        name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    base, tasks = (
        BaseWeights(modules),
        [{name: full_delta(module) for name, module in modules.items()} for _ in range(2)],
    )
    tasks[1]["inside.out"] = Delta(torch.randn(2, 4), torch.randn(2, 2), 0.5)
    for number, task in enumerate(tasks):
        save_deltas(tmp_path / f"{number}.safetensors", task)
    base.apply([load_deltas(tmp_path / f"{number}.safetensors") for number in range(2)])

    assert set(modules) == {"inside", "inside.patch", "inside.position", "inside.norm", "inside.out"}
    for name, p in model.named_parameters():
        module, _, own = name.rpartition(".")
        changes = [task[module].changes()[own] for task in tasks if own in task[module].changes()]
        assert len(changes) == (1 if name == "inside.out.bias" else 2)
        torch.testing.assert_close(p.detach(), before[name] + sum(changes))
    base.apply([])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_file_with_full_changes_of_linear_layers_is_read_as_it_was_written_before_there_were_others(
    tmp_path,
):
    tensors = {
        "a.b.weight": torch.randn(2, 3),
        "a.b.bias": torch.randn(2),
        "c.weight": torch.randn(2, 2),
        "d.A": torch.randn(1, 3),
        "d.B": torch.randn(2, 1),
    }
    write_tensors(tmp_path / "delta.safetensors", tensors, {"scales": '{"d": 0.5}'})
    loaded = load_deltas(tmp_path / "delta.safetensors")

    assert {name: list(delta.tensors) for name, delta in loaded.items()} == {
        "d": ["A", "B"],
        "a.b": ["bias", "weight"],
        "c": ["weight"],
    }
    assert torch.equal(loaded["a.b"].parameters["bias"], tensors["a.b.bias"]) and loaded["d"].scale == 0.5


def test_tensors_are_read_to_where_fresh_ones_are_so_that_a_resumed_run_rounds_alike(tmp_path):
    fresh = torch.empty(3).data_ptr() % 64
    path = tmp_path / "delta.safetensors"
    for length in range(70):  # Headers of all lengths, which the tensors follow in the file.
        tensors = {"d.A": torch.randn(2, 3), "d.B": torch.randn(5, 2), "e.whole.bias": torch.randn(5)}
        write_tensors(path, tensors, {"scales": '{"d": 0.5}', "note": "x" * length})
        read, deltas = read_tensors(path), load_deltas(path)
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
        found = [*read.values(), deltas["d"].A, deltas["d"].B]
        assert {tensor.data_ptr() % 64 for tensor in found} == {fresh}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untouched_weights_are_the_bases_in_the_block_and_carry_the_same_after_it_also_after_an_error(
    stacked, dtype
):
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3).to(dtype), torch.randn(5, 4, dtype=dtype)
    weights, base = BaseWeights({"a": layer}, stacked=stacked), layer(x)
    deltas = [{"a": Delta(torch.randn(2, 4), torch.randn(3, 2), 0.5)} for _ in range(3)]
    weights.apply(deltas)
    carried = layer(x)
    for _ in range(3):
        with pytest.raises(KeyError), weights.untouched():
            assert torch.equal(layer(x), base)
            raise KeyError
        assert torch.equal(layer(x), carried) and not torch.equal(carried, base)
    weights.apply(deltas[:1])
    one = layer(x)
    with weights.untouched():
        assert torch.equal(layer(x), base)
    assert torch.equal(layer(x), one)
    weights.apply([])
    with weights.untouched():
        assert torch.equal(layer(x), base)
    assert torch.equal(layer(x), base)
