"""The identities of NuSA-CL: only M trains, between bases of the current weight's tail."""

import json

import pytest
import torch
from torch import nn

from llava_keeplora.adapters import attach, detach, read_adapters, since_start
from llava_keeplora.errors import MethodError
from llava_keeplora.methods import METHODS, Layer, TaskContext
from llava_keeplora.subspace import NonFiniteError, ShapeError, spectral_tail

NusaCl = METHODS["nusa-cl"]
WIDE, TALL, ENERGY = (5, 9), (9, 6), 0.9


def layer(shape, rank=3, energy=ENERGY, seed=0, auto=()):
    torch.manual_seed(seed)
    module = nn.Linear(shape[1], shape[0], bias=False).double()
    return Layer("layer", "vision", module, rank, 0.5 * rank, energy, 0.9, auto)


def context(part, deltas=(), index=1):
    return TaskContext(index, "t", {"layer": part}, None, None, 0, 0, deltas=lambda: list(deltas))


@pytest.fixture(params=[WIDE, TALL], ids=["wide", "tall"])
def trained(request):
    """(layer, initial adapter, M, delta, function in training on an input) after M was set by hand."""
    part, method = layer(request.param), NusaCl(NusaCl.Options(dropout=0.0))
    ctx, net = context(part), nn.ModuleDict({"layer": part.module})
    init = method.init_adapters(ctx)["layer"]
    wrapper = attach(net, {"layer": init})
    with method.training_context(ctx, net):
        names = {name for name, p in net.named_parameters() if p.requires_grad}
        M = net.get_parameter("layer.lora_A.default.between.weight")
        x = torch.randn(7, request.param[1]).double()
        start = net["layer"](x)
        with torch.no_grad():
            M.copy_(torch.randn(M.shape))
        value, M = net["layer"](x).detach(), M.detach().clone()
        deltas = {"layer": since_start(read_adapters(net, {"layer": init})["layer"], init)}
        delta = method.finalize_deltas(ctx, deltas)["layer"]
    detach(wrapper)
    return part, init, M, delta, (names, x, start, value)


def test_only_m_is_trained_and_the_task_starts_from_the_current_weights(trained):
    part, init, _, _, (names, x, start, _) = trained
    assert names == {"layer.lora_A.default.between.weight"}
    assert torch.equal(start, x @ part.module.weight.T)
    assert init.scale == 0.5


def test_the_update_is_u_m_v_on_the_tail_of_an_svd_and_merges_exactly(trained):
    part, init, M, delta, (_, x, _, value) = trained
    W = part.module.weight.detach()
    U, S, Vh = torch.linalg.svd(W)
    k = int((S.square().cumsum(0) / S.square().sum() < ENERGY).sum()) + 1
    rank = min(3, len(S) - k)
    left, right = U[:, len(S) - rank : len(S)], Vh[len(S) - rank : len(S)]
    torch.testing.assert_close(init.B.double() @ init.B.T.double(), left @ left.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(init.A.T.double() @ init.A.double(), right.T @ right, atol=1e-6, rtol=0)
    update = init.scale * init.B.double() @ M.double() @ init.A.double()
    torch.testing.assert_close(delta.dense().double(), update, atol=1e-6, rtol=0)
    torch.testing.assert_close(value, x @ (W + update).T, atol=1e-5, rtol=0)


def test_principal_directions_answer_as_before_on_both_sides(trained):
    part, _, _, delta, _ = trained
    U, S, Vh = torch.linalg.svd(part.module.weight.detach())
    k = int((S.square().cumsum(0) / S.square().sum() < ENERGY).sum()) + 1
    update = delta.dense().double()
    assert float(update.norm()) > 0.1
    assert float((update @ Vh[:k].T).abs().max()) < 1e-6 and float((U[:, :k].T @ update).abs().max()) < 1e-6


def test_the_tail_is_that_of_the_weight_with_all_updates_where_these_are_kept_apart():
    part, method = layer(WIDE), NusaCl(NusaCl.Options())
    first = method.init_adapters(context(part))["layer"]
    update = {"layer": type("Update", (), {"dense": lambda self, device: 2 * torch.ones(WIDE)})()}
    merged = layer(WIDE)
    merged.module.weight.data += 2
    expected = method.init_adapters(context(merged))["layer"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava_keeplora.adapters.base.is_stacked", lambda module: True)
        stacked = method.init_adapters(context(part, [update], 2))["layer"]
    torch.testing.assert_close(stacked.A.T @ stacked.A, expected.A.T @ expected.A, atol=1e-5, rtol=0)
    assert not torch.allclose(first.A.T @ first.A, expected.A.T @ expected.A, atol=1e-2)


def test_a_layer_with_few_directions_gets_a_smaller_m_of_the_same_scale_and_one_with_none_is_left_out():
    method = NusaCl(NusaCl.Options())
    init = method.init_adapters(context(layer(WIDE, rank=5)))["layer"]
    assert 0 < init.rank < 5 and init.scale == 0.5
    ctx = context(layer(WIDE, energy=1.0))
    with pytest.raises(MethodError, match="no adapted layer has a direction left.*lower energy_weight"):
        method.init_adapters(ctx)


def test_capacity_counts_the_principal_directions():
    part, ctx = layer(WIDE), context(layer(WIDE))
    S = torch.linalg.svdvals(part.module.weight.detach()).square()
    NusaCl(NusaCl.Options()).after_task(ctx)
    k = int((S.cumsum(0) / S.sum() < ENERGY).sum()) + 1
    assert ctx.report["capacity"]["layer"] == {"in": 9, "k": k, "part": "vision"}


def test_nothing_is_kept_of_a_task_and_no_data_are_read_for_it_but_by_its_training(
    run_config, driven, tiny_tasks, tmp_path
):
    tasks, methods = [str(path) for path in tiny_tasks[:2]], {"nusa-cl": {}, "keeplora": {}}
    run = driven(run_config(tmp_path / "run", methods=methods, tasks=tasks))
    passes, states = {}, {}
    for label in methods:
        entries = [json.loads(line) for line in (run / label / "journal.jsonl").read_text().splitlines()]
        assert sum(entry["stage"] == "TRAINED" for entry in entries) == 2
        passes[label] = [entry["info"]["passes"] for entry in entries if "passes" in entry["info"]]
        states[label] = [path.name for path in run.glob(f"{label}/task-*/state.safetensors")]
    assert not passes["nusa-cl"] and not states["nusa-cl"] and not list(run.glob("nusa-cl/task-*/kept.*"))
    assert passes["keeplora"] and states["keeplora"]
    method, ctx = NusaCl(NusaCl.Options()), context(layer(WIDE))
    method.after_task(ctx)
    assert method.state_dict() == {} and method.holds(ctx, ()) == {}


def test_wrong_settings_are_refused():
    with pytest.raises(MethodError, match="dropout must be in"):
        NusaCl.Options(dropout=1.0)
    with pytest.raises(MethodError, match=r"parts.vision.energy_weight is 'auto'.*0\.95"):
        NusaCl(NusaCl.Options()).check({"layer": layer(WIDE, auto=("energy_weight",))})
    with pytest.raises(ShapeError, match="must be a matrix"):
        spectral_tail(torch.ones(3), 0.9, 1)
    with pytest.raises(NonFiniteError, match="weight"):
        spectral_tail(torch.full((3, 3), float("nan")), 0.9, 1)
