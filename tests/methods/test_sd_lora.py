"""The identities of SD-LoRA, its continuous form: directions are frozen, magnitudes go on, nothing jumps between tasks."""

import json

import pytest
import torch
from torch import nn

from llava_keeplora.adapters import (
    AdapterInit,
    Delta,
    attach,
    compress,
    concatenate,
    load_deltas,
    lora_layers,
    read_adapters,
)
from llava_keeplora.methods import METHODS, Layer, TaskContext

SdLora = METHODS["sd-lora"]
RANK = 2
STEP = {"training": {"max_steps": 1}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_config, driven):
    methods = {
        "sd-lora": {},
        "one-step": {"method": "sd-lora", **STEP},
        "one-step-lora": {"method": "seq-lora", **STEP},
    }
    return driven(run_config(tmp_path_factory.mktemp("sd-lora") / "run", methods=methods))


def deltas(finished, label="sd-lora"):
    return [load_deltas(path) for path in sorted((finished / label).glob("task-*/delta.safetensors"))]


def shifts(finished):
    return [
        json.loads(path.read_text())["report"]["magnitude_shift"]
        for path in sorted((finished / "sd-lora").glob("task-*/train.json"))
    ]


def test_the_first_step_of_the_first_task_is_loras(finished):
    """At B = 0 the magnitude has no gradient, so that A and B make the same step."""
    ours, theirs = deltas(finished, "one-step")[0], deltas(finished, "one-step-lora")[0]
    for name, delta in ours.items():
        assert torch.equal(delta.dense(), theirs[name].dense()) and delta.B.any()


def test_a_later_task_moves_along_earlier_directions_only_by_one_number_for_all_layers(finished):
    tasks = deltas(finished)
    for number, (task, moved) in enumerate(zip(tasks, shifts(finished), strict=True)):
        assert len(moved) == number + 1 and all(moved)
        for name, delta in task.items():
            assert delta.A.shape[0] == RANK * (number + 1)
            rest = delta.dense().double() - delta.B[:, :RANK].double() @ delta.A[:RANK].double()
            for earlier, shift in zip(tasks, moved[:-1]):
                rest -= shift * earlier[name].B[:, :RANK].double() @ earlier[name].A[:RANK].double()
            assert float(rest.abs().max()) < 1e-6


def test_the_change_of_a_magnitude_is_small_against_the_direction_but_there(finished):
    first, *_, last = shifts(finished)
    assert all(1e-4 < abs(shift) < 0.5 for shift in (*first, *last))


def test_all_tasks_together_have_the_rank_of_their_own_directions_so_that_compressing_to_it_loses_nothing(
    finished,
):
    for delta in concatenate(deltas(finished)).values():
        assert delta.A.shape[0] == RANK * (1 + 2 + 3)
        small, singular = compress(delta, RANK * 3)
        torch.testing.assert_close(small.dense(), delta.dense(), atol=1e-6, rtol=0)
        assert float(singular[RANK * 3 :].max()) < 1e-6 * float(singular[0])


# --- on one layer --------------------------------------------------------------------------------


@pytest.fixture
def trained():
    """(plain weight, network with an adapter in training, its method and context) with two earlier tasks, everything moved from where it starts."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": nn.Linear(6, 4, bias=False)}).double()
    weight = net["layer"].weight.detach().clone()
    # The second task's delta has moved the first one's magnitude already.
    own = [(torch.randn(RANK, 6).double(), torch.randn(4, RANK).double()) for _ in range(2)]
    earlier = [
        Delta(*own[0], 0.5),
        Delta(torch.cat([own[1][0], own[0][0]]), torch.cat([own[1][1], 0.1 * own[0][1]], dim=1), 1.0),
    ]
    attach(net, {"layer": AdapterInit(RANK, 2 * RANK, B=torch.randn(4, RANK), train_A=True)})
    net = net.double()
    ctx = TaskContext(
        3,
        "t",
        {"layer": Layer("layer", "vision", net["layer"], RANK, 2.0 * RANK, 0.5, 0.9)},
        None,
        None,
        0,
        0,
        deltas=lambda: [{"layer": delta} for delta in earlier],
    )
    method = SdLora(SdLora.Options())
    with method.training_context(ctx, net):
        with torch.no_grad():
            net.magnitude_shift.copy_(torch.tensor([0.3, -0.2, 0.7]))
        yield weight, own, net, method, ctx


def test_the_function_in_training_is_the_sum_of_directions_times_magnitudes_and_what_is_left_behind(trained):
    weight, own, net, method, ctx = trained
    adapter, x = read_adapters(net)["layer"], torch.randn(5, 6).double()
    directions = [
        0.5 * own[0][1] @ own[0][0],
        own[1][1] @ own[1][0],
        adapter.scale * (adapter.B.double() @ adapter.A.double()),
    ]
    expected = weight + sum(m * d for m, d in zip((0.3, -0.2, 1.7), directions))
    torch.testing.assert_close(net["layer"](x), x @ expected.T, atol=1e-5, rtol=1e-5)
    left = method.finalize_deltas(ctx, {"layer": adapter})["layer"]
    torch.testing.assert_close(weight + left.dense().double(), expected, atol=1e-5, rtol=1e-5)
    assert ctx.report["magnitude_shift"] == pytest.approx([0.3, -0.2, 0.7])


def test_every_magnitude_gets_the_gradient_along_its_direction(trained):
    _, own, net, method, _ = trained
    adapter, x = read_adapters(net)["layer"], torch.randn(5, 6).double()
    net["layer"](x).sum().backward()
    directions = [
        0.5 * own[0][1] @ own[0][0],
        own[1][1] @ own[1][0],
        adapter.scale * (adapter.B.double() @ adapter.A.double()),
    ]
    expected = torch.stack([(x @ direction.T).sum() for direction in directions])
    torch.testing.assert_close(net.magnitude_shift.grad, expected, atol=1e-4, rtol=1e-5)


def test_earlier_directions_are_no_parameters(trained):
    _, _, net, _, _ = trained
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        "magnitude_shift",
        "layer.lora_A.default.weight",
        "layer.lora_B.default.weight",
    }
    assert len(lora_layers(net)) == 1
