"""The identities of OSF: the strong part of a weight does not change, the weak part is trained in full."""

import json

import pytest
import torch
from torch import nn

from llava_keeplora.adapters import load_deltas
from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.methods import METHODS, Layer, TaskContext
from llava_keeplora.run_folder import CONFIG, IDENTITY, dump_config
from llava_keeplora.saved_run import extended, load_run, run_identity

Osf = METHODS["osf"]
SHAPES = {"wide": (6, 10), "tall": (10, 6), "square": (8, 8)}


class Net(nn.Module):
    """Three layers side by side."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, (out, width) in SHAPES.items():
            setattr(self, name, nn.Linear(width, out).double())

    def forward(self, inputs):
        return {name: getattr(self, name)(x) for name, x in inputs.items()}


def train(steps=5, **options):
    """(weights before, deltas, names of trained parameters, outputs at the start and after training, inputs, network)."""
    net, method = Net(), Osf(Osf.Options(**options))
    for p in net.parameters():
        p.requires_grad_(False)
    before = {name: getattr(net, name).weight.clone() for name in SHAPES}
    layers = {name: Layer(name, "vision", getattr(net, name), 2, 2.0, 0.5, 0.9) for name in SHAPES}
    method.check(layers)
    ctx = TaskContext(1, "t", layers, None, None, 0, 0)
    inputs = {name: torch.randn(20, width).double() for name, (_, width) in SHAPES.items()}
    targets = {name: torch.randn(20, out).double() for name, (out, _) in SHAPES.items()}
    with method.training_context(ctx, net):
        trained = {name for name, p in net.named_parameters() if p.requires_grad}
        start = net(inputs)
        groups = [
            {"params": [p for p in net.parameters() if p.requires_grad], "lr": 0.05, "weight_decay": 0.1}
        ]
        optimizer = method.create_optimizer(ctx, torch.optim.AdamW(groups))
        for _ in range(steps):
            optimizer.zero_grad()
            sum((y - targets[name]).square().mean() for name, y in net(inputs).items()).backward()
            optimizer.step()
        end, deltas = net(inputs), method.finalize_deltas(ctx, {})
    return before, deltas, trained, start, end, inputs, net


def strong(weight):
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    k = min(weight.shape) // 2
    return U[:, :k], Vh[:k]


def test_the_strong_directions_answer_as_before_on_both_sides():
    before, deltas, *_ = train()
    for name, W in before.items():
        change = deltas[name].dense().double()
        U, Vh = strong(W)
        assert float(change.norm()) > 0.1
        assert float((change @ Vh.T).abs().max()) < 1e-6 and float((U.T @ change).abs().max()) < 1e-6
        kept = U @ U.T @ (W + change) @ Vh.T @ Vh
        torch.testing.assert_close(kept, U @ U.T @ W @ Vh.T @ Vh, atol=1e-6, rtol=0)


def test_without_the_projection_of_steps_adamw_leaves_the_space_as_in_peft():
    before, deltas, *_ = train(project_steps=False)
    leaks = [float((deltas[name].dense().double() @ strong(W)[1].T).norm()) for name, W in before.items()]
    assert max(leaks) > 1e-2


def test_a_task_starts_from_the_weights_trains_the_weak_part_alone_merges_exactly_and_leaves_the_layers_as_they_were():
    before, deltas, trained, start, end, inputs, net = train()
    assert trained == {
        f"{name}.osf_svd_params.default.{part}" for name in SHAPES for part in ("U_low", "S_low", "V_low")
    }
    for name, W in before.items():
        layer = getattr(net, name)
        assert type(layer) is nn.Linear and torch.equal(layer.weight, W)
        torch.testing.assert_close(start[name], layer(inputs[name]), atol=1e-6, rtol=0)
        merged = inputs[name] @ (W + deltas[name].dense()).T + layer.bias
        torch.testing.assert_close(end[name], merged, atol=1e-5, rtol=1e-5)


def test_the_frozen_share_grows_with_the_tasks_and_leaves_a_direction():
    layer = Layer("l", "vision", nn.Linear(10, 8), 2, 2.0, 0.5, 0.9)
    method = Osf(Osf.Options(preserved=0.5, preserved_step=0.25))
    assert [method.frozen(layer, task) for task in (1, 2, 3, 9)] == [4, 6, 7, 7]
    ctx = TaskContext(1, "t", {"l": layer}, None, None, 0, 0)
    method.after_task(ctx)
    assert ctx.report["capacity"]["l"] == {"in": 10, "k": 6, "part": "vision"}


def test_a_second_task_freezes_the_strong_directions_of_the_weight_with_the_first_tasks_change(
    run_config, driven, tiny_tasks, tmp_path
):
    tasks = [str(path) for path in tiny_tasks[:2]]
    run = driven(run_config(tmp_path / "run", methods={"osf": {}}, tasks=tasks))
    base, first, second = load_learned_run(run, "osf").load(deltas=[]).model, *deltas_of(run)
    leaks = []
    for name, delta in second.items():
        W, change = base.get_submodule(name).weight.detach().double(), delta.dense().double()
        U, Vh = strong(W + first[name].dense().double())
        assert float(change.norm()) > 1e-2
        assert float((change @ Vh.T).norm() / change.norm()) < 1e-4
        assert float((U.T @ change).norm() / change.norm()) < 1e-4
        leaks.append(float((change @ strong(W)[1].T).norm() / change.norm()))
    assert max(leaks) > 0.1, "in some layers, those of the base are others"


def deltas_of(run):
    return [load_deltas(path) for path in sorted((run / "osf").glob("task-*/delta.safetensors"))]


def test_a_share_that_leaves_a_task_nothing_to_train_is_refused(run_tree, tiny_tasks, tmp_path):
    def tree(count):
        row = {"method": "osf", "preserved": 0.5, "preserved_step": 0.25}
        return run_tree(tmp_path / "run", methods={"row": row}, tasks=[str(p) for p in tiny_tasks[:count]])

    said = r"methods.row.preserved_step 0.25 freezes all directions in task 3 of 3 .preserved is 0.5.*to less than 0.25"
    with pytest.raises(ConfigError, match=said):
        parse_config(tree(3))
    two = parse_config(tree(2))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text(dump_config(two))
    (tmp_path / "run" / IDENTITY).write_text(json.dumps(run_identity(two)))
    with pytest.raises(ConfigError, match=said):
        extended(tmp_path / "run", str(tiny_tasks[2]))
    # As versions did that took it without a word, and whose runs go on.
    three = parse_config(tree(3), recorded=True)
    (tmp_path / "run" / CONFIG).write_text(dump_config(three))
    (tmp_path / "run" / IDENTITY).write_text(json.dumps(run_identity(three)))
    assert load_run(tmp_path / "run").methods == three.methods


def test_wrong_settings_and_quantised_weights_are_refused(monkeypatch):
    with pytest.raises(MethodError, match="preserved must be in"):
        Osf.Options(preserved=1.0)
    with pytest.raises(MethodError, match="preserved_step must be in"):
        Osf.Options(preserved_step=-0.1)
    monkeypatch.setattr("llava_keeplora.methods.osf.is_quantised", lambda module: True)
    with pytest.raises(MethodError, match="layer l is quantised; leave the base unquantised"):
        Osf(Osf.Options()).check({"l": Layer("l", "vision", nn.Linear(4, 4), 2, 2.0, 0.5, 0.9)})


def test_only_the_projection_of_steps_is_an_optimiser_of_its_own(run_tree, tmp_path):
    def tree(project, **training):
        methods = {"osf": {"project_steps": project}}
        return run_tree(tmp_path / "run", methods=methods, training=training)

    for training in ({"deepspeed": {"zero_optimization": {"stage": 2}}}, {"optim": "sgd"}):
        with pytest.raises(
            ConfigError, match="'osf' .*an optimiser of its own.*; .*set methods.osf.project_steps to false"
        ):
            parse_config(tree(True, **training))
        parse_config(tree(False, **training))
    with pytest.raises(ConfigError, match="reads trained parameters outside of their layers.*; use stage 2"):
        parse_config(tree(False, deepspeed={"zero_optimization": {"stage": 3}}))
    default = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    assert Osf(Osf.Options(project_steps=False)).create_optimizer(None, default) is default
