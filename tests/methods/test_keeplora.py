"""The identities of KeepLoRA, on every adapted layer after every task of a real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, CLIPModel

from llava_keeplora.adapters import AdapterInit, Delta, attach, load_deltas, read_adapters
from llava_keeplora.errors import MethodError
from llava_keeplora.methods import METHODS, Layer, TaskContext
from llava_keeplora.sequence import run
from llava_keeplora.subspace import project
from llava_keeplora.testing import check_method
from llava_keeplora_recipes import load_recipe

pytestmark = pytest.mark.usefixtures("without_reports")
KeepLora = METHODS["keeplora"]


# --- on a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_config):
    config = run_config(tmp_path_factory.mktemp("keeplora"), methods={"keeplora": {}})
    run(config)
    return Path(config.output_dir) / "keeplora"


def folders(finished):
    return sorted(p for p in finished.glob("task-*") if not p.name.startswith("task-00"))


def bases_before(finished, task):
    """Layer → M' as it was before task number `task` (1, 2, ...)."""
    states = [
        load_file(p / "state.safetensors")
        for p in sorted(finished.glob("task-*"))[:task]
        if (p / "state.safetensors").exists()
    ]
    return {name: torch.cat([s[name] for s in states if name in s], dim=1) for name in states[0]}


def test_A_is_orthonormal_and_outside_the_protected_subspace(finished):
    for number, folder in enumerate(folders(finished), start=1):
        bases = bases_before(finished, number)
        for name, delta in load_deltas(folder / "delta.safetensors").items():
            A = delta.A.double()
            torch.testing.assert_close(A @ A.T, torch.eye(len(A)).double(), atol=2e-6, rtol=0)
            assert float((A @ bases[name].double()).abs().max()) < 2e-6


def test_an_input_inside_the_protected_subspace_gives_the_same_output_after_the_task(finished):
    for number, folder in enumerate(folders(finished), start=1):
        bases = bases_before(finished, number)
        for name, delta in load_deltas(folder / "delta.safetensors").items():
            change = delta.dense()
            assert float(change.norm()) > 0, "a task that changes nothing proves nothing"
            assert float((change @ bases[name]).norm()) < 1e-5 * float(change.norm()) + 1e-12


def test_every_update_lies_in_the_span_of_A(finished):
    for folder in folders(finished):
        prepared = load_file(folder / "adapters.safetensors")
        for name, delta in load_deltas(folder / "delta.safetensors").items():
            change = delta.dense().double()
            torch.testing.assert_close(
                project(change, prepared[f"{name}.A"].T.double()), change, atol=1e-7, rtol=1e-5
            )


def test_A_is_frozen_through_training(finished):
    for folder in folders(finished):
        prepared = load_file(folder / "adapters.safetensors")
        for name, delta in load_deltas(folder / "delta.safetensors").items():
            assert torch.equal(delta.A, prepared[f"{name}.A"])


def test_the_basis_stays_orthonormal_grows_by_the_recorded_number_and_fits_the_input(finished):
    for number, folder in enumerate(folders(finished), start=1):
        before, after = bases_before(finished, number), bases_before(finished, number + 1)
        report = json.loads((folder / "consolidated.json").read_text())
        for name, basis in after.items():
            width, k = basis.shape
            assert k <= width
            assert (
                k
                == before[name].shape[1] + report["feature_energy"][name]["new"]
                == report["capacity"][name]["k"]
            )
            assert torch.equal(basis[:, : before[name].shape[1]], before[name])
            torch.testing.assert_close(
                basis.T.double() @ basis.double(), torch.eye(k).double(), atol=5e-6, rtol=0
            )


def test_the_protected_share_of_the_features_reaches_the_threshold(finished):
    for folder in folders(finished):
        for numbers in json.loads((folder / "consolidated.json").read_text())["feature_energy"].values():
            assert numbers["after"] >= 0.9 - 1e-9


# --- on one layer --------------------------------------------------------------------------------


def layer_context(weight_shape=(6, 10), rank=3, gradient=None, energy_weight=0.5, index=1):
    torch.manual_seed(0)
    module = nn.Linear(weight_shape[1], weight_shape[0], bias=False)
    layer = Layer("layer", "vision", module, rank, float(rank), energy_weight, 0.9)

    def gradients(fraction, statistics):
        if gradient is not None:
            statistics["layer"].add(torch.eye(weight_shape[1]), gradient.T)

    def features(make, fraction):
        made = make([["layer"]])
        made["layer"].add(torch.randn(50, weight_shape[1]), None)
        return made

    return TaskContext(index, "t", {"layer": layer}, gradients, features, seed=0, statistics_bytes=10**9)


def started(options=None, **kwargs):
    method = KeepLora(KeepLora.Options(**(options or {})))
    method.after_task(layer_context(index=0, **kwargs))
    return method


def test_training_B_by_gradient_descent_is_full_gradient_descent_projected_with_A_A_transposed():
    """Proposition 3.1: with W = W_0 + s B A and A frozen, ΔW after each step is −η s² G(W) AᵀA."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 10).double(), torch.randn(20, 6).double()
    A = torch.linalg.qr(torch.randn(10, 3).double()).Q.T
    scale, rate = 0.5, 0.1
    weight = torch.randn(6, 10).double()

    def gradient(w):
        w = w.clone().requires_grad_(True)
        nn.functional.mse_loss(x @ w.T, y).backward()
        return w.grad

    net = nn.ModuleDict({"layer": nn.Linear(10, 6, bias=False)}).double()
    net["layer"].weight.data = weight.clone()
    attach(net, {"layer": AdapterInit(3, 1.5, A=A)})
    net = net.double()
    net["layer"].lora_A["default"].weight.data = A
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=rate)
    projected = weight.clone()
    for _ in range(25):
        optimiser.zero_grad()
        nn.functional.mse_loss(net["layer"](x), y).backward()
        optimiser.step()
        projected = projected - rate * scale**2 * gradient(projected) @ A.T @ A
    torch.testing.assert_close(
        weight + read_adapters(net)["layer"].scale * (net["layer"].lora_B["default"].weight @ A), projected
    )


def test_weight_decay_pulls_the_literal_form_towards_the_weights_without_its_start_and_the_delta_form_not(
    tmp_path, run_config, tiny_tasks
):
    """One step of SGD from the same model: literal − delta = −η λ s B₀ A (method, 'A being frozen')."""
    rate, decay = 0.05, 0.5
    config = run_config(
        tmp_path / "run",
        tasks=[str(tiny_tasks[0])],
        methods={form: {"method": "keeplora", "form": form} for form in ("delta", "literal")},
        training={
            "optim": "sgd",
            "max_steps": 1,
            "learning_rate": rate,
            "weight_decay": decay,
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
        },
    )
    run(config)
    (delta,), (literal,) = (folders(Path(config.output_dir) / form) for form in ("delta", "literal"))
    start = load_file(literal / "adapters.safetensors")
    ours, theirs = (load_deltas(folder / "delta.safetensors") for folder in (delta, literal))
    for name in ours:
        pull = -rate * decay * theirs[name].scale * start[f"{name}.B"] @ start[f"{name}.A"]
        assert float(pull.abs().max()) > 0
        torch.testing.assert_close(theirs[name].dense() - ours[name].dense(), pull, atol=1e-6, rtol=1e-3)


@pytest.fixture(scope="module")
def forms(tmp_path_factory, run_config, tiny_tasks) -> Path:
    """A run of both forms, and of the first one again, without weight decay."""
    methods = {"delta": {}, "literal": {"form": "literal"}, "again": {}}
    config = run_config(
        tmp_path_factory.mktemp("forms"),
        tasks=[str(task) for task in tiny_tasks[:2]],
        methods={label: {"method": "keeplora", **options} for label, options in methods.items()},
        training={"weight_decay": 0.0},
    )
    run(config)
    return Path(config.output_dir)


def test_a_method_starts_from_the_base_whatever_ran_before_it(forms):
    for folder in folders(forms / "delta"):
        for file in ("adapters.safetensors", "delta.safetensors", "state.safetensors"):
            assert (folder / file).read_bytes() == (forms / "again" / folder.name / file).read_bytes()


def test_the_two_forms_give_the_same_run_without_weight_decay(forms):
    for folder in folders(forms / "delta"):
        ours = load_deltas(folder / "delta.safetensors")
        theirs = load_deltas(forms / "literal" / folder.name / "delta.safetensors")
        for name in ours:
            scale = float(ours[name].dense().abs().max())
            torch.testing.assert_close(ours[name].dense(), theirs[name].dense(), atol=0.02 * scale, rtol=0)


def test_a_layer_without_a_gradient_is_named_and_left_out():
    method = started()
    ctx = layer_context(gradient=torch.randn(6, 10))
    ctx.layers["silent"] = Layer("silent", "vision", nn.Linear(10, 6), 3, 3.0, 0.5, 0.9)
    method.bases["silent"] = method.bases["layer"]

    inits = method.init_adapters(ctx)

    assert set(inits) == {"layer"} and ctx.report["left_out"] == {"silent": "no gradient"}


@pytest.mark.parametrize(
    ("name", "options", "cure"),
    [
        ("keeplora", {}, "lower energy_weight or energy_feature, or adapt"),
        ("eblora", {}, "lower energy_feature, or adapt"),
        ("eblora", {"protect_weights": True}, "lower energy_weight or energy_feature, or adapt"),
    ],
)
def test_when_every_layer_is_full_the_task_is_refused_before_a_pass_over_its_data(name, options, cure):
    cls = METHODS[name]
    method, ctx = cls(cls.Options(**options)), layer_context(gradient=torch.randn(6, 10))
    method.bases = {"layer": torch.eye(10)}
    ctx.gradients = lambda *args, **kwargs: pytest.fail("no layer takes a gradient")
    with pytest.raises(MethodError, match=f"no adapted layer has a direction left for task 't'; {cure}"):
        method.init_adapters(ctx)


def test_when_no_layer_has_a_gradient_the_task_is_refused():
    with pytest.raises(
        MethodError, match="no adapted layer has a direction left for task 't'; lower energy_weight"
    ):
        started().init_adapters(layer_context())


def test_a_gradient_inside_the_protected_subspace_leaves_the_layer_out_rather_than_giving_it_a_random_A():
    method = started()
    inside = torch.randn(6, method.bases["layer"].shape[1]) @ method.bases["layer"].T
    with pytest.raises(MethodError, match="no adapted layer"):
        method.init_adapters(layer_context(gradient=inside))


def test_a_gradient_of_lower_rank_gives_fewer_directions_at_the_same_scale():
    method = started()
    thin = torch.randn(6, 1) @ torch.randn(1, 10)
    (init,) = method.init_adapters(layer_context(gradient=thin)).values()
    assert init.rank == 1 and init.scale == 1.0


def test_a_rank_larger_than_the_residual_space_is_refused_with_the_layer_and_the_cure():
    with pytest.raises(
        MethodError,
        match=r"layer layer has \d+ of 10 input directions outside .* fewer than the rank 9; lower parts.vision.rank",
    ):
        started(rank=9, energy_weight=0.9)


def test_without_W_p_nothing_is_protected_before_the_first_task():
    assert started({"protect_weights": False}).bases["layer"].shape == (10, 0)


def test_without_M_t_the_basis_does_not_grow():
    method = started({"protect_features": False})
    before = method.bases["layer"].clone()
    method.after_task(layer_context())
    assert torch.equal(method.bases["layer"], before)


def test_the_random_ablation_is_random_orthonormal_and_still_outside_the_protected_subspace():
    method = started({"init": "random"})
    gradient = torch.randn(6, 10)
    (init,) = method.init_adapters(layer_context(gradient=gradient)).values()
    (guided,) = started().init_adapters(layer_context(gradient=gradient)).values()
    torch.testing.assert_close(init.A @ init.A.T, torch.eye(3), atol=1e-5, rtol=0)
    assert float((init.A @ method.bases["layer"]).abs().max()) < 1e-5
    assert float((project(init.A, guided.A.T) - init.A).norm()) > 0.1


def test_an_interpolated_update_is_that_share_of_what_training_learned():
    A, B = torch.randn(2, 10), torch.randn(6, 2)
    (merged,) = started({"interpolation": 0.25}).finalize_deltas(None, {"layer": Delta(A, B, 2.0)}).values()
    torch.testing.assert_close(merged.dense(), 0.25 * 2.0 * B @ A)
    (whole,) = started().finalize_deltas(None, {"layer": Delta(A, B, 2.0)}).values()
    assert torch.equal(whole.dense(), Delta(A, B, 2.0).dense())


def test_an_update_is_bounded_by_the_norm_of_the_weight_outside_of_the_protected_subspace():
    method, ctx = started({"update_bound": 0.5}), layer_context()
    weight, basis = ctx.layers["layer"].module.weight.detach().double(), method.bases["layer"].double()
    largest = 0.5 * float(torch.linalg.norm(weight - weight @ basis @ basis.T))
    A, B = torch.randn(2, 10), torch.randn(6, 2)
    long = Delta(A, B, 2.0 * largest / float((B @ A).norm()))
    (merged,) = method.finalize_deltas(ctx, {"layer": long}).values()
    torch.testing.assert_close(merged.dense(), 0.5 * long.dense())
    assert float(merged.dense().double().norm()) == pytest.approx(largest)
    assert ctx.report["update_shares"] == {"layer": pytest.approx(0.5)}
    short = Delta(A, B, 0.495 * long.scale)
    (whole,) = method.finalize_deltas(ctx, {"layer": short}).values()
    assert torch.equal(whole.dense(), short.dense())
    (none,) = method.finalize_deltas(ctx, {"layer": Delta(A, torch.zeros_like(B), 1.0)}).values()
    assert not none.dense().any() and ctx.report["update_shares"] == {"layer": 1.0}


def test_a_bound_on_updates_is_positive_and_of_the_form_that_starts_at_the_weight():
    for bound in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(MethodError, match="update_bound must be a positive number"):
            KeepLora.Options(update_bound=bound)
    for form in ({"form": "literal"}, {"preset": "released-clip"}):
        with pytest.raises(MethodError, match="from which the literal form does not start"):
            KeepLora.Options(update_bound=0.5, **form)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_run_with_bounded_updates_is_killed_and_extended_as_one_in_one_go(
    run_tree, tiny_tasks, tmp_path, quantization
):
    tasks = [str(path) for path in tiny_tasks[:2]]
    changes = {"model": {"quantization": quantization}} if quantization else {}
    check_method("keeplora", {"update_bound": 0.01}, run_tree(tmp_path / "run", tasks=tasks, **changes))


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_an_interpolation_outside_of_0_and_1_is_refused(share):
    with pytest.raises(MethodError, match=r"interpolation must be in \(0, 1\]"):
        KeepLora.Options(interpolation=share)


def test_the_state_of_all_tasks_rebuilds_the_bases_bit_for_bit():
    method = started()
    states = [method.state_dict()]
    method.after_task(layer_context())
    states.append(method.state_dict())
    again = KeepLora(KeepLora.Options())
    again.load_state_dicts(states)
    assert torch.equal(again.bases["layer"], method.bases["layer"]) and again.capacity() == method.capacity()


def test_the_released_preset_needs_square_layers_and_says_so():
    with pytest.raises(MethodError, match="in layer layer: the released-clip preset .* square"):
        started({"preset": "released-clip"})


def test_the_released_preset_protects_the_prompts_at_every_position(tmp_path, run_config, tiny_clip):
    config = run_config(
        tmp_path / "run", methods={"released": {"method": "keeplora", "preset": "released-clip"}}
    )
    run(config)
    # What the text encoder's first layer reads depends on nothing that was trained.
    model, name = CLIPModel.from_pretrained(tiny_clip), "text_model.encoder.layers.0.self_attn.q_proj"
    width, recipe = model.config.text_config.max_position_embeddings, load_recipe(config.tasks[0])
    ids = [AutoTokenizer.from_pretrained(tiny_clip)(prompt)["input_ids"] for prompt in recipe.prompts]
    text = model.text_model
    with torch.no_grad():
        embedded = text.embeddings(input_ids=torch.tensor([row + [0] * (width - len(row)) for row in ids]))
        read = text.encoder.layers[0].layer_norm1(embedded).flatten(0, 1).double()
    folder = Path(config.output_dir) / "released"
    before, new = (
        load_file(next(folder.glob(f"task-0{i}*")) / "state.safetensors")[name].double() for i in range(2)
    )
    total, outside = float(read.square().sum()), read - read @ before @ before.T
    inside = 1.0 - float(outside.square().sum()) / total
    _, singular, right = torch.linalg.svd(outside)
    count = (
        int((inside + torch.cumsum(singular.square(), 0) / total < config.parts["text"].energy_feature).sum())
        + 1
    )
    assert new.shape[1] == count
    torch.testing.assert_close(new @ new.T, right[:count].T @ right[:count], atol=1e-4, rtol=0)


def test_the_released_llava_preset_protects_the_gradient_instead_of_the_features_and_starts_B_at_zero():
    torch.manual_seed(3)
    method = started({"preset": "released-llava"})
    before, gradient = method.bases["layer"].clone(), torch.randn(6, 2) @ torch.randn(2, 10)
    ctx = layer_context(gradient=gradient)
    (init,) = method.init_adapters(ctx).values()
    assert init.B is None and not init.train_A and torch.equal(init.A, init.A.half().float())
    assert method.dropout == 0.05

    ctx.features = lambda statistic: pytest.fail("the preset looks at no features")
    method.after_task(ctx)
    new = method.bases["layer"][:, before.shape[1] :]
    rows = torch.linalg.qr(torch.cat([before, gradient.T], dim=1)).Q
    assert 1 <= new.shape[1] <= 2, "the gradient has rank two"
    torch.testing.assert_close(project(new.T, rows), new.T, atol=1e-5, rtol=0)


def test_the_released_llava_preset_runs(tmp_path, run_config):
    run(
        run_config(tmp_path / "run", methods={"released": {"method": "keeplora", "preset": "released-llava"}})
    )
