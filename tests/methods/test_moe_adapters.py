"""The identities of MoE-Adapters: the mixture beside the MLP, the routers, what is frozen, and the auto-encoders that choose a task."""

import json
from math import prod

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, relu

from llava_keeplora.errors import MethodError
from llava_keeplora.methods import METHODS
from llava_keeplora.methods.auto_encoder import AutoEncoder
from llava_keeplora.methods.experts import Mixture, mixed
from llava_keeplora.methods.routed import ORIGINAL, Route

MoeAdapters = METHODS["moe-adapters"]
SMALL = {"experts": 4, "bottleneck": 8, "code": 4}


def method(**options):
    return MoeAdapters(MoeAdapters.Options(**{**SMALL, **options}))


# --- one layer -----------------------------------------------------------------------------------


def mixture(experts=5, top_k=2, tasks=2, **changes):
    """One with everything moved from zero, in float64."""
    torch.manual_seed(0)
    found = (
        Mixture(
            6,
            **{
                "experts": experts,
                "bottleneck": 3,
                "tasks": tasks,
                "top_k": top_k,
                "scale": 0.1,
                "dropout": 0.0,
                **changes,
            },
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        for p in found.parameters():
            p.normal_()
    return found


@pytest.fixture
def x():
    return torch.randn(7, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def alone(expert, x):
    return 0.1 * linear(
        relu(linear(x, expert.down.weight, expert.down.bias)), expert.up.weight, expert.up.bias
    )


def test_fresh_experts_add_nothing_in_training_and_test(x):
    fresh = Mixture(6, experts=5, bottleneck=3, tasks=1, top_k=2, scale=0.1, dropout=0.1)
    for mode in (True, False):
        assert not fresh.train(mode)(x.float(), 0).any()


@pytest.mark.parametrize("training", [True, False])
def test_exactly_the_best_experts_take_part_and_their_gates_are_their_softmax(x, training):
    router = mixture().routers[1].train(training)
    gates = router(x[:, 0], 2)
    assert ((gates > 0).sum(1) == 2).all()
    torch.testing.assert_close(gates.sum(1), torch.ones(7))
    if not training:
        scores = (x[:, 0].float() @ router.score.float().T).topk(2, dim=1)
        torch.testing.assert_close(gates.gather(1, scores.indices), scores.values.softmax(1))


def test_the_noise_of_training_has_the_spread_that_the_router_learns():
    """With one score per draw, its spread over many draws."""
    router = mixture(experts=2, top_k=1).routers[0].train()
    first = torch.ones(20000, 6, dtype=torch.float64)
    scores, spread = (float(first[0].float() @ p[0].detach().float()) for p in (router.score, router.spread))
    torch.manual_seed(0)
    with torch.no_grad():
        router.score[1], router.spread[1] = (
            0.0,
            -100.0,
        )  # nearly without noise: the first wins as often as its noise says
        share = float(router(first, 1)[:, 0].mean())
    wide = torch.nn.functional.softplus(torch.tensor(spread)) + 0.01
    assert share == pytest.approx(
        float(torch.distributions.Normal(0.0, wide).cdf(torch.tensor(scores))), abs=0.02
    )


def test_it_is_the_sum_over_the_chosen_experts_alone(x):
    """Sparse dispatch: every example goes through its own two experts."""
    found = mixture()
    gates = found.routers[1](x[:, 0], 2)
    expected = torch.stack(
        [
            sum(gates[i, e] * alone(found.experts[e], x[i]) for e in gates[i].nonzero()[:, 0].tolist())
            for i in range(7)
        ]
    )
    torch.testing.assert_close(found(x, 1), expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(found(x, 0), expected, atol=1e-3), "the other task's router chooses otherwise"


@pytest.mark.parametrize("tokens", [1, 4])
def test_computing_all_experts_and_an_examples_own_is_the_same_with_the_same_gradients(x, tokens):
    found, x = mixture(), x[:, :tokens].requires_grad_()
    gates = found.routers[1](x[:, 0], 2).double()
    both = []
    for form in (found._dense_sum, found._sparse_sum):
        for p in found.parameters():
            p.grad = None
        out = form(x, gates)
        both.append(
            [
                out,
                *torch.autograd.grad(out.square().sum(), [x, *found.experts.parameters()], retain_graph=True),
            ]
        )
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(found(x, 1), found.scale * both[tokens * 5 > 2 * 6][0]), "few tokens, all experts"


def test_one_expert_is_the_plain_parallel_adapter(x):
    found = mixture(experts=1, top_k=1)
    torch.testing.assert_close(found(x, 0), alone(found.experts[0], x))


def test_identical_experts_of_which_all_take_part_are_one_expert(x):
    found = mixture(experts=4, top_k=4)
    for expert in found.experts:
        expert.load_state_dict(found.experts[0].state_dict())
    torch.testing.assert_close(found(x, 0), alone(found.experts[0], x), atol=1e-6, rtol=1e-6)


def test_every_expert_gets_a_gradient_of_zero_where_no_example_went(x):
    found = mixture(tasks=1).train()
    found(x[:1], 0).sum().backward()
    taken = [bool(expert.up.bias.grad.any()) for expert in found.experts]
    assert sum(taken) == 2 and all(p.grad is not None for p in found.parameters())


def test_it_reads_the_residual_before_the_second_norm_and_is_added_to_the_mlp(family):
    """By hand: one layer of the model, x + MLP(norm x) + y."""
    layer = family.model.vision_model.encoder.layers[0]
    own = Mixture(32, experts=3, bottleneck=3, tasks=1, top_k=2, scale=0.1, dropout=0.0).eval()
    with torch.no_grad():
        for p in own.parameters():
            p.normal_()
        states = torch.randn(2, 5, 32)
        x = states + layer.self_attn(layer.layer_norm1(states))[0]
        expected = x + layer.mlp(layer.layer_norm2(x)) + own(x, 0)
        with mixed([layer], [own], 0):
            found = layer(states, attention_mask=None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --- on the model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(teach):
    return teach(method())


def test_with_fresh_experts_training_begins_at_clip_exactly_and_loss_is_cross_entropy_with_smoothed_labels(
    family, data, contexts, batch_of
):
    own, batch, task = method(label_smoothing=0.3), batch_of(0), family.task(data[0].recipe)
    own.load_state_dicts([{}])
    with torch.no_grad(), own.training_context(contexts(1), family.model):
        out = task.train()(**batch)
        task.eval()
    plain = task(**batch)
    assert torch.equal(out["logits"], plain["logits"])
    smoothed = torch.full((len(batch["labels"]), 4), 0.3 / 4).scatter(
        1, batch["labels"][:, None], 0.7 + 0.3 / 4
    )
    expected = -(smoothed * plain["logits"].log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(own.loss(contexts(1), batch, out), expected)


def test_the_text_router_has_the_same_gate_for_every_prompt_and_the_image_router_has_not(taught):
    seen = {"vision": [], "text": []}
    mixtures = taught.method.mixtures(taught.family.model, 2).eval()
    handles = [
        one.routers[1].register_forward_hook(lambda module, args, gates, part=part: seen[part].append(gates))
        for part, layers in mixtures.items()
        for one in layers
    ]
    taught.method._mixtures = mixtures
    taught.method.routes = lambda image: [Route(1)] * len(image)
    taught.logits(1)
    del taught.method.routes
    for handle in handles:
        handle.remove()
    assert len(seen["vision"]) == len(seen["text"]) == 2
    for gates in seen["text"]:
        torch.testing.assert_close(gates, gates[:1].expand_as(gates))
    assert any((gates - gates[:1]).abs().max() > 1e-3 for gates in seen["vision"])


def test_the_experts_that_took_part_most_are_frozen_for_good_and_earlier_routers_too(taught):
    trainable = {
        name
        for name, p in taught.method.mixtures(taught.family.model, 3).named_parameters()
        if p.requires_grad
    }
    layers = [f"{part}.{i}" for part in ("vision", "text") for i in range(2)]
    for row, layer in enumerate(layers):
        frozen = {
            int(i)
            for state in taught.method.learned_states
            for i in state["counts"][row].argsort(descending=True, stable=True)[:2]
        }
        for expert in range(4):
            assert (f"{layer}.experts.{expert}.up.weight" in trainable) == (expert not in frozen)
        assert [f"{layer}.routers.{task}.score" in trainable for task in range(3)] == [False, False, True]


# --- in a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_config, driven, tiny_tasks):
    methods = {"moe-adapters": {**SMALL, "experts": 5, "training": {"weight_decay": 0.1}}}
    return driven(run_config(tmp_path_factory.mktemp("moe") / "run", methods=methods))


def kept(finished):
    return [load_file(path) for path in sorted((finished / "moe-adapters").glob("task-*/kept.safetensors"))]


def test_every_example_and_prompt_of_every_step_is_counted(finished):
    for state in kept(finished):
        # 24 images in 3 steps, 4 prompts in each, two experts for either.
        assert state["counts"].sum(1).tolist() == [48, 48, 24, 24]


def test_frozen_experts_are_not_trained_any_more_and_the_others_are(finished):
    first, second, third = kept(finished)
    for row, layer in enumerate(f"{part}.{i}" for part in ("vision", "text") for i in range(2)):
        frozen = set()
        for state in (first, second, third):
            assert {int(name.split(".")[3]) for name in state if name.startswith(f"{layer}.experts")} == set(
                range(5)
            ) - frozen
            frozen |= set(state["counts"][row].argsort(descending=True, stable=True)[:2].tolist())
    assert all(
        not torch.equal(value, first[name])
        for name, value in second.items()
        if name.endswith("down.weight") and name in first
    )


def test_an_auto_encoder_of_every_task_is_kept_with_its_usual_error(finished):
    for number in (1, 2, 3):
        (folder,) = (finished / "moe-adapters").glob(f"task-0{number}-*")
        state, told = (
            load_file(folder / "state.safetensors"),
            json.loads((folder / "consolidated.json").read_text()),
        )
        assert sum(prod(value.shape) for value in state.values()) == 2 * 16 * 4 + 4 + 16 + 1
        assert told["auto_encoder_error"] == pytest.approx(float(state["auto_encoder.usual"]))


# --- routing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    """Function (kind, count) → unit features of images that lie in a subspace of the kind's own."""

    def draw(kind, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(32, 4, generator=torch.Generator().manual_seed(kind)))[0]
        rows = torch.randn(count, 4, generator=generator) @ basis.T + 0.02 * torch.randn(
            count, 32, generator=generator
        )
        return rows / rows.norm(dim=1, keepdim=True)

    return draw


@pytest.fixture(scope="module")
def router(pictures):
    """Function (**options) → a method that has seen two kinds of images."""
    coders = [AutoEncoder.trained(pictures(kind, 200), 16, seed=kind) for kind in (1, 2)]

    def build(**options):
        own = method(**options)
        own.load_state_dicts(
            [{}, *({f"auto_encoder.{k}": v for k, v in coder.state_dict().items()} for coder in coders)]
        )
        return own

    return build


def test_an_image_goes_to_the_task_that_knows_it_and_to_clip_where_none_does(router, pictures):
    routes = router().routes(torch.cat([pictures(kind, 50, seed=9) for kind in (1, 2, 3)]))
    for kind, expected in enumerate((Route(0), Route(1), ORIGINAL)):
        assert sum(route == expected for route in routes[50 * kind : 50 * (kind + 1)]) >= 40


def test_above_the_threshold_everything_goes_to_clip_and_without_one_nothing(router, pictures):
    strange = pictures(3, 20)
    assert set(router(threshold=1e-9).routes(pictures(1, 20))) == {ORIGINAL}
    assert ORIGINAL not in router(threshold=1e9).routes(strange)


def test_a_batch_has_the_route_of_its_mean_error_if_it_is_asked_for(router, pictures):
    batch = torch.cat([pictures(1, 12, seed=9), pictures(2, 4, seed=9)])
    assert set(router(routing="batch", threshold=1e9).routes(batch)) == {Route(0)}
    assert set(router(threshold=1e9).routes(batch)) == {Route(0), Route(1)}


def test_an_auto_encoder_is_the_same_again_and_leaves_the_generator_alone(pictures):
    rows, before = pictures(1, 30), torch.get_rng_state()
    first, second = (AutoEncoder.trained(rows, 4, seed=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_its_usual_error_is_that_on_every_fifth_image_which_it_never_sees(pictures):
    rows = pictures(1, 30)
    coder = AutoEncoder.trained(rows, 4, seed=5)
    assert float(coder.usual) == pytest.approx(float(coder.error(rows[4::5]).mean()))
    changed = rows.clone()
    changed[4::5] = pictures(2, 6)
    assert torch.equal(AutoEncoder.trained(changed, 4, seed=5).encoder.weight, coder.encoder.weight)


@pytest.mark.parametrize("count", [1, 4])
def test_few_images_are_enough_for_one(pictures, count):
    coder = AutoEncoder.trained(pictures(1, count), 4, seed=5)
    assert 0 < float(coder.usual) < float("inf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"top_k": 5},
            "top_k must be from 1 to the number of experts, 4 .got 5",
        ),
        ({"top_k": 0}, "top_k must be from 1 .*got 0"),
        ({"bottleneck": 0}, "bottleneck must be at least 1 .got 0"),
        ({"code": 0}, "code must be at least 1 .got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\) .got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in .*got -0.1"),
        (
            {"threshold": 0.0},
            "threshold must be above 0 .got 0.0",
        ),
    ],
)
def test_settings_that_are_none_are_refused(options, words):
    with pytest.raises(MethodError, match=words):
        method(**options)
