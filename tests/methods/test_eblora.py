"""The identities of EBLoRA: U and V stay on the Stiefel manifold, V outside of F, and s is the only magnitude."""

import math

import pytest
import torch
from torch import nn

from llava_keeplora.adapters import attach, detach
from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.methods import METHODS, Layer, TaskContext
from llava_keeplora.methods.stiefel import Frame, StiefelAdamW

EbLora = METHODS["eblora"]
IN, OUT, RANK = 12, 9, 3


def basis(width, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.float64)).Q


def naive_step(X, G, F, state, *, lr, decay, scale):
    """One step written out for one matrix: AdamW on the Riemannian gradient, the tangent, the retraction."""
    G = G - F @ F.T @ G
    G = G - X @ G.T @ X
    state["m"] = 0.9 * state["m"] + 0.1 * G
    state["v"] = 0.999 * state["v"] + 0.001 * G * G
    state["t"] += 1
    m, v = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
    D = (-lr * decay * X - lr * m / (v.sqrt() + 1e-8)) / scale
    D = D - F @ F.T @ D
    D = D - X @ D.T @ X
    Y = X + D
    Y = Y - F @ F.T @ Y
    # The polar factor by the inverse root of YᵀY.
    values, vectors = torch.linalg.eigh(Y.T @ Y)
    return Y @ vectors @ torch.diag(values.rsqrt()) @ vectors.T


def test_every_step_is_the_published_one_and_stays_on_the_manifold_outside_f():
    F, target = basis(IN, 2, 1), basis(IN, RANK, 2)
    start = torch.linalg.qr(torch.randn(IN, RANK, dtype=torch.float64) - 0).Q
    start = torch.linalg.qr(start - F @ F.T @ start).Q
    Vt, U = nn.Parameter(start.T.clone()), nn.Parameter(basis(OUT, RANK, 3))
    s = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    groups = [{"params": [U, Vt, s], "lr": 0.01, "weight_decay": 0.1}]
    optimizer = StiefelAdamW(groups, {Vt: Frame(True, F, RANK), U: Frame(False, None, RANK)}, 48.0)
    plain = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    adam = torch.optim.AdamW([plain], lr=0.01, weight_decay=0.1)
    X, state = start.clone(), {"m": 0.0, "v": 0.0, "t": 0}
    for _ in range(5):
        optimizer.zero_grad()
        loss = (
            ((Vt.T - target) * torch.arange(1.0, IN + 1)[:, None]).square().sum()
            + U.sum()
            + s.square().sum()
            + s.sum()
        )
        loss.backward()
        (plain.square().sum() + plain.sum()).backward()
        G = Vt.grad.T.clone()
        optimizer.step()
        adam.step()
        adam.zero_grad()
        X = naive_step(X, G, F, state, lr=0.01, decay=0.1, scale=math.sqrt(RANK / 48.0))
        torch.testing.assert_close(Vt.detach().T, X, atol=1e-10, rtol=0)
        eye = torch.eye(RANK, dtype=torch.float64)
        torch.testing.assert_close(Vt.detach() @ Vt.detach().T, eye, atol=1e-12, rtol=0)
        torch.testing.assert_close(U.detach().T @ U.detach(), eye, atol=1e-12, rtol=0)
        assert float((F.T @ Vt.detach().T).abs().max()) < 1e-12
        assert torch.equal(s, plain), "s is trained by AdamW alone"
    assert float((X - start).norm()) > 0.1


def layer(name="model.layers.0.q", energy=0.9, auto=()):
    torch.manual_seed(0)
    return Layer(name, "language", nn.Linear(IN, OUT, bias=False), RANK, 2.0 * RANK, 0.5, energy, auto)


def context(part, gradient, index=1):
    def gradients(fraction, statistics):
        assert fraction == 0.2
        statistics[part.name].matrix.copy_(gradient)

    return TaskContext(index, "t", {part.name: part}, gradients, None, 0, 10**9)


def test_u_and_v_are_those_of_the_gradient_outside_f_and_f_grows_by_the_energy_rule():
    part, method = layer(), EbLora(EbLora.Options())
    G = [torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    method.after_task(context(part, G[0]))
    S, Vh = torch.linalg.svd(G[0].double())[1:]
    k = int((S.square().cumsum(0) / S.square().sum() < 0.9).sum()) + 1
    F = method.bases[part.name].double()
    torch.testing.assert_close(F @ F.T, Vh[:k].T @ Vh[:k], atol=1e-5, rtol=0)
    init = method.init_adapters(context(part, G[1], 2))[part.name]
    left, _, right = torch.linalg.svd(G[1].double() - G[1].double() @ F @ F.T)
    torch.testing.assert_close(
        init.B.double() @ init.A.double(), left[:, :RANK] @ right[:RANK], atol=1e-5, rtol=0
    )
    assert float((init.A.double() @ F).abs().max()) < 1e-6 and init.train_A and init.scale == 2.0
    states = [{}, method.state_dict()]
    again = EbLora(EbLora.Options())
    again.load_state_dicts(states)
    assert torch.equal(again.bases[part.name], method.bases[part.name])


def test_with_protected_weights_f_begins_with_the_weights_principal_directions():
    part, method = layer(), EbLora(EbLora.Options(protect_weights=True))
    method.after_task(context(part, None, index=0))
    S, Vh = torch.linalg.svd(part.module.weight.detach().double())[1:]
    k = int((S.square().cumsum(0) / S.square().sum() < 0.5).sum()) + 1
    W = method.bases[part.name].double()
    torch.testing.assert_close(W @ W.T, Vh[:k].T @ Vh[:k], atol=1e-5, rtol=0)
    states = [method.state_dict()]
    gradient = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    method.after_task(context(part, gradient))
    F = method.bases[part.name].double()
    torch.testing.assert_close(F.T @ F, torch.eye(F.shape[1], dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(F[:, :k], W) and F.shape[1] > k
    init = method.init_adapters(context(part, gradient, 2))[part.name]
    assert float((init.A.double() @ F).abs().max()) < 1e-6
    again = EbLora(EbLora.Options(protect_weights=True))
    again.load_state_dicts([*states, method.state_dict()])
    assert torch.equal(again.bases[part.name].double(), F)
    assert method.holds(context(part, None, index=0), ()) and not EbLora(EbLora.Options()).holds(
        context(part, None, index=0), ()
    )


def test_the_update_has_equal_singular_values_and_merges_exactly():
    part, method = layer(), EbLora(EbLora.Options(dropout=0.0, scale_start=0.002, scale_slope=0.006))
    ctx = context(part, torch.randn(OUT, IN))
    init = method.init_adapters(ctx)[part.name]
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.ModuleDict({"q": part.module})])
    W, x = part.module.weight.detach().clone(), torch.randn(4, IN)
    wrapper = attach(model, {part.name: init})
    with method.training_context(ctx, model):
        s = model.get_parameter(f"{part.name}.lora_A.default.between.weight")
        assert float(s) == pytest.approx(-0.008)  # The only block is the last one.
        with torch.no_grad():
            s.fill_(-0.3)
        output = model.get_submodule(part.name)(x).detach()
        delta = method.finalize_deltas(ctx, {})[part.name]
    detach(wrapper)
    torch.testing.assert_close(output, x @ (W + delta.dense()).T, atol=1e-5, rtol=1e-5)
    S = torch.linalg.svdvals(delta.dense().double())
    torch.testing.assert_close(S[:RANK], torch.full((RANK,), 0.6).double(), atol=1e-6, rtol=0)
    assert float(S[RANK:].max()) < 1e-6 and ctx.report["scales"][part.name] == pytest.approx(-0.3)


@pytest.mark.parametrize(("step_scale", "widths"), [("rank", (RANK, RANK)), ("width", (IN, OUT))])
def test_steps_of_u_and_v_alone_are_retracted_and_divided_by_the_root_of_the_rank_or_of_their_width(
    step_scale, widths
):
    part, method = layer(), EbLora(EbLora.Options(dropout=0.0, step_scale=step_scale))
    method.after_task(context(part, torch.randn(OUT, IN)))
    F, free = method.bases[part.name].double(), torch.zeros(OUT, 0, dtype=torch.float64)
    assert F.shape[1] > 0
    ctx = context(part, torch.randn(OUT, IN), 2)
    init = method.init_adapters(ctx)[part.name]
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.ModuleDict({"q": part.module})])
    wrapper = attach(model, {part.name: init})
    model.projector = nn.Linear(4, 4)  # Trained in full.
    with method.training_context(ctx, model):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        (A,) = (p for name, p in trained.items() if name.endswith("lora_A.default.weight"))
        (B,) = (p for name, p in trained.items() if name.endswith("lora_B.default.weight"))
        (s,) = (p for name, p in trained.items() if name.endswith("between.weight"))
        others = [s, *model.projector.parameters()]
        assert len(trained) == 2 + len(others)
        plain = [nn.Parameter(p.detach().clone()) for p in others]
        groups = [{"params": list(trained.values()), "lr": 0.01, "weight_decay": 0.1}]
        optimizer = method.create_optimizer(ctx, torch.optim.AdamW(groups))
        adam = torch.optim.AdamW(plain, lr=0.01, weight_decay=0.1)
        V, U = A.detach().T.double(), B.detach().double()
        states = [{"m": 0.0, "v": 0.0, "t": 0} for _ in range(2)]
        for _ in range(3):
            for p in trained.values():
                p.grad = torch.randn_like(p)
            for p, own in zip(others, plain, strict=True):
                own.grad = p.grad.clone()
            gradients = A.grad.T.double(), B.grad.double()
            optimizer.step()
            adam.step()
            scales = [math.sqrt(width / 4096) for width in widths]
            V = naive_step(V, gradients[0], F, states[0], lr=0.01, decay=0.1, scale=scales[0])
            U = naive_step(U, gradients[1], free, states[1], lr=0.01, decay=0.1, scale=scales[1])
            torch.testing.assert_close(A.detach().T.double(), V, atol=1e-5, rtol=0)
            torch.testing.assert_close(B.detach().double(), U, atol=1e-5, rtol=0)
            assert all(torch.equal(p, own) for p, own in zip(others, plain, strict=True))
    detach(wrapper)


def test_s_starts_lower_in_later_blocks():
    layers = {name: layer(name) for name in ("m.layers.0.q", "m.layers.1.q", "m.layers.4.q", "connector.q")}
    starts = EbLora(EbLora.Options(scale_start=0.002, scale_slope=0.006))._scale_starts(layers)
    assert list(starts.values()) == pytest.approx([-0.002, -0.0035, -0.008, -0.002])


def test_wrong_settings_are_refused(run_tree, tmp_path):
    for options in (
        {"step_scale": "root"},
        {"gradient_fraction": 0.0},
        {"dropout": 1.0},
        {"distillation": -1.0},
    ):
        with pytest.raises(MethodError, match=next(iter(options))):
            EbLora.Options(**options)
    with pytest.raises(MethodError, match="energy_feature is 'auto'"):
        EbLora(EbLora.Options()).check({"q": layer(auto=("energy_feature",))})
    auto = {"q": layer(auto=("energy_weight",))}
    EbLora(EbLora.Options()).check(auto)
    with pytest.raises(MethodError, match="energy_weight is 'auto'.*protect_weights to false"):
        EbLora(EbLora.Options(protect_weights=True)).check(auto)
    for training, why in (
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "needs whole matrices.*without DeepSpeed"),
        ({"optim": "sgd"}, "training.optim is sgd; remove it"),
    ):
        with pytest.raises(ConfigError, match=f"'eblora' .*an optimiser of its own.*{why}"):
            parse_config(run_tree(tmp_path / "run", methods={"eblora": {}}, training=training))
