"""The identities of EWC and RegLoRA, against naive formulas in float64, and of what both keep."""

import pytest
import torch
from torch import nn

from llava_keeplora.adapters import AdapterInit, Delta, attach, lora_layers
from llava_keeplora.capture import gradient_pass
from llava_keeplora.errors import MethodError
from llava_keeplora.methods import METHODS, Layer, TaskContext
from llava_keeplora.methods.ewc import SquaredGradient
from llava_keeplora.models import Prepared

Ewc, RegLora = METHODS["ewc"], METHODS["reglora"]
SHAPES = {"first": (4, 6), "second": (10, 5)}


def layers(dtype=torch.float64):
    torch.manual_seed(0)
    modules = {name: nn.Linear(inner, out, bias=False).to(dtype) for name, (out, inner) in SHAPES.items()}
    return {name: Layer(name, "vision", module, 2, 3.0, 0.5, 0.9) for name, module in modules.items()}


def context(of, deltas=(), index=1, **values):
    return TaskContext(index, "t", of, None, None, 0, 0, deltas=lambda: list(deltas), **values)


def penalty(method, scale=1.5):
    """(penalty, {layer: (A, B)}, scale) of adapters that are not at zero, with the gradients computed."""
    of = layers()
    net = nn.ModuleDict({name: layer.module for name, layer in of.items()})
    starts = {
        name: AdapterInit(2, 2 * scale, torch.randn(2, inner), torch.randn(out, 2), train_A=True)
        for name, (out, inner) in SHAPES.items()
    }
    attach(net, starts)
    net.double()
    ctx = context(of, index=2, model=net)
    with method.training_context(ctx, net):
        loss = method.loss(ctx, {}, {"loss": torch.zeros((), dtype=torch.float64, requires_grad=True)})
        loss.backward()
    adapters = {
        name: (la.lora_A["default"].weight, la.lora_B["default"].weight)
        for name, la in lora_layers(net).items()
    }
    return loss.detach(), adapters, scale


def compare(found, naive):
    """Compare a penalty and its gradients with those of a formula by autograd."""
    value, adapters, scale = found
    twins = {
        name: tuple(p.detach().clone().requires_grad_() for p in pair) for name, pair in adapters.items()
    }
    expected = naive(twins, scale)
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    for name, pair in adapters.items():
        for ours, theirs in zip(pair, twins[name], strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def states(count, make):
    torch.manual_seed(1)
    return [{}] + [{name: make(shape) for name, shape in SHAPES.items()} for _ in range(count)]


# --- EWC -----------------------------------------------------------------------------------------


def test_the_penalty_of_ewc_is_half_lambda_times_the_sum_of_all_tasks_fisher_times_the_squared_update():
    kept = states(3, lambda shape: torch.rand(shape, dtype=torch.float64))
    method = Ewc(Ewc.Options(strength=7.0))
    method.load_state_dicts(kept)

    def naive(pairs, scale):
        return (
            7.0
            / 2
            * sum(
                (task[name] * (scale * B @ A) ** 2).sum()
                for task in kept[1:]
                for name, (A, B) in pairs.items()
            )
        )

    compare(penalty(method), naive)


def test_without_an_earlier_task_the_loss_is_the_tasks_own():
    method = Ewc(Ewc.Options())
    method.load_state_dicts([{}])
    assert float(penalty(method)[0]) == 0.0


@pytest.fixture(scope="module")
def fisher(family, data):
    """(F of every layer by the pass, the same by autograd, one example at a time) on the small CLIP in float64."""
    model, split = family.model.double(), data[0].take(range(5))
    task, inputs = family.task(split.recipe), family.inputs(split, Prepared(family, split))
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("q_proj", "fc2"))
    ]
    of = {name: Layer(name, "vision", model.get_submodule(name), 2, 2.0, 0.5, 0.9) for name in names}
    statistics = Ewc(Ewc.Options()).gradient_statistics(of)
    batches = [(inputs.collate([i]), True) for i in range(5)]
    modules = {name: layer.module for name, layer in of.items()}
    gradient_pass(task, modules, [*batches, (batches[0][0], False)], 1, statistics, per_example=True)
    naive = dict.fromkeys(names, 0.0)
    for name in names:
        modules[name].weight.requires_grad_(True)
    for batch, _ in batches:
        out = task(**batch)
        model.zero_grad()
        (-out["logits"].log_softmax(1)[0, batch["labels"][0]]).backward()
        naive = {name: naive[name] + modules[name].weight.grad.square() / 5 for name in names}
    model.requires_grad_(False)
    return {name: statistic.tensors[0] / 5 for name, statistic in statistics.items()}, naive


def test_f_is_the_mean_of_every_examples_squared_gradient_in_both_encoders(fisher):
    ours, naive = fisher
    assert any("text_model" in name for name in ours) and any("vision_model" in name for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], naive[name], rtol=1e-3, atol=1e-9)  # the loss is in fp32


def test_a_batch_of_several_examples_would_give_another_f():
    x, dy = torch.randn(2, 3, 6).double(), torch.randn(2, 3, 4).double()
    together, apart = (SquaredGradient(layers()["first"]) for _ in range(2))
    together.add(x, dy)
    apart.add(x[:1], dy[:1])
    apart.add(x[1:], dy[1:])
    assert not torch.allclose(together.tensors[0], apart.tensors[0])


@pytest.mark.parametrize(
    ("weight", "stored"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_f_is_stored_as_wide_as_the_weight_and_never_in_fp16(weight, stored):
    of, method = layers(weight), Ewc(Ewc.Options(fisher_fraction=0.5))

    def gradients(fraction, statistics, per_example=False):
        assert fraction == 0.5 and per_example
        for statistic in statistics.values():
            statistic.tensors[0] += 8.0
        return 4

    ctx = context(of)
    ctx.gradients = gradients
    method.after_task(ctx)
    state = method.state_dict()
    assert {name: (tuple(f.shape), f.dtype) for name, f in state.items()} == {
        name: (shape, stored) for name, shape in SHAPES.items()
    }
    assert all(bool((f == 2.0).all()) for f in state.values())
    planned = method.planned_state(of, 3)
    assert all(planned[name].dtype == stored and planned[name].shape == state[name].shape for name in of)
    assert all(declared.shape == SHAPES[name] for name, declared in method.holds(ctx, ()).items())


def test_the_sum_is_the_same_after_a_task_as_when_it_is_read_back():
    kept = states(3, lambda shape: torch.rand(shape).bfloat16())
    once, again = Ewc(Ewc.Options()), Ewc(Ewc.Options())
    once.load_state_dicts(kept)
    again.load_state_dicts(kept[:1])
    for index in (1, 2, 3):
        again.measure = lambda ctx, index=index: kept[index]
        again.after_task(context(layers(), index=index))
    assert all(torch.equal(once._kept[name], again._kept[name]) for name in SHAPES)


# --- RegLoRA -------------------------------------------------------------------------------------


def largest(update, count):
    """Positions of the largest absolute entries, by sorting all."""
    return set(sorted(range(update.numel()), key=lambda i: -abs(float(update.flatten()[i])))[:count])


def deltas(seed):
    torch.manual_seed(seed)
    return {
        name: Delta(torch.randn(2, inner), torch.randn(out, 2), 1.5) for name, (out, inner) in SHAPES.items()
    }


def test_the_largest_entries_of_the_finished_tasks_update_are_kept():
    method, of = RegLora(RegLora.Options(share=0.2)), layers()
    method.after_task(context(of, [deltas(1), deltas(2)], index=2))
    state = method.state_dict()
    for name, delta in deltas(2).items():
        update = 1.5 * delta.B.double() @ delta.A.double()
        positions = state[name].tolist()
        assert state[name].dtype == torch.int32 and positions == sorted(positions)
        assert set(positions) == largest(update, int(0.2 * update.numel()))
        declared = method.holds(context(of), ())[name]
        assert declared.shape == tuple(state[name].shape) and declared.integer


def test_the_penalty_of_reglora_is_the_mean_over_layers_of_the_mean_product_at_the_key_elements():
    method, of = RegLora(RegLora.Options(strength=30.0, share=0.2)), layers()
    for index, seed in enumerate((0, 0, 1), start=1):
        method.after_task(context(of, [deltas(seed)], index=index))
    chosen = {name: [] for name in SHAPES}
    for seed in (0, 0, 1):
        for name, delta in deltas(seed).items():
            chosen[name] += largest(product := delta.B @ delta.A, int(0.2 * product.numel()))
    assert any(len(set(positions)) < len(positions) for positions in chosen.values()), "one is chosen twice"

    def naive(pairs, scale):
        means = [(B @ A).flatten()[chosen[name]].abs().mean() for name, (A, B) in pairs.items()]
        return 30.0 * sum(means) / len(means)

    compare(penalty(method), naive)


def test_a_layer_of_fewer_entries_than_have_a_key_element_keeps_none():
    method, of = RegLora(RegLora.Options()), layers()  # 2 % of 24 entries, and of 50
    method.after_task(context(of, [deltas(1)]))
    assert {name: len(kept) for name, kept in method.state_dict().items()} == {"second": 1}
    assert not method.holds(context(of), ())["first"].required
    assert method.planned_state(of, 3)["second"].shape == (3,)


def test_a_share_of_key_elements_is_refused_if_no_layer_has_one_and_layers_without_are_named(caplog):
    RegLora(RegLora.Options()).check(layers())
    assert (
        "share 0.02 leaves no key element in 1 of 2 layers, whose updates are not held: first" in caplog.text
    )
    with pytest.raises(MethodError, match="in any layer: the largest, second, has 50 entries; .*0.02") as e:
        RegLora(RegLora.Options(share=0.01)).check(layers())
    least = float(str(e.value).split("at least ")[1].split(",")[0])
    caplog.clear()
    RegLora(RegLora.Options(share=least)).check(layers())
    assert "in 1 of 2 layers" in caplog.text
    caplog.clear()
    RegLora(RegLora.Options(share=0.2)).check(layers())
    assert not caplog.text


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (Ewc, {"strength": -1.0}, "strength must not be negative .got -1.0.; set it to 0"),
        (Ewc, {"fisher_fraction": 0.0}, "fisher_fraction must be above 0 and at most 1 .got 0.0"),
        (RegLora, {"strength": float("nan")}, "strength must not be negative .got nan"),
        (RegLora, {"share": 1.5}, "share must be above 0 and at most 1 .got 1.5.; set it to 0.02"),
    ],
)
def test_settings_that_are_none_are_refused(cls, options, words):
    with pytest.raises(MethodError, match=words):
        cls.Options(**options)


@pytest.mark.parametrize("cls", [Ewc, RegLora])
def test_training_holds_what_is_kept_of_all_tasks_once_as_the_plan_counts_it(cls):
    of, method = layers(torch.float32), cls(cls.Options())
    net = nn.ModuleDict({name: layer.module for name, layer in of.items()})
    method.measure = lambda ctx: {name: method.expected(layer, 1).clone() for name, layer in of.items()}
    for task in (1, 2, 3):
        method.after_task(context(of, index=task))
        assert method.state_dict(), "what is stored of the task"
        with method.training_context(context(of, index=task + 1, model=net), net):
            held = {tensor.data_ptr(): tensor for tensor in (*method._kept.values(), *method._added.values())}
            planned = method.planned_state(of, task)
            assert sum(t.nbytes for t in held.values()) == sum(t.nbytes for t in planned.values())
