"""The identities of IAP: prompts, gates, Gaussians and the weights that come from them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import MultivariateNormal

from llava_keeplora.errors import MethodError
from llava_keeplora.methods import METHODS
from llava_keeplora.methods.gaussians import Gaussians
from llava_keeplora.methods.prompts import Gate, Prompts, prompted
from llava_keeplora.methods.routed import ORIGINAL, Route
from llava_keeplora_eval.predictors import image_features

Iap = METHODS["iap"]


def method(**options):
    return Iap(Iap.Options(**options))


# --- prompts and gates ---------------------------------------------------------------------------


@pytest.fixture
def prompts():
    torch.manual_seed(0)
    found = Prompts(32, 3, 2)
    torch.nn.init.normal_(found.values)
    return found.requires_grad_(False)


def test_prompts_start_uniform_and_without_a_value():
    torch.manual_seed(0)
    fresh = Prompts(64, 50, 2).requires_grad_(False)
    assert (
        not fresh.values.any()
        and -1 <= float(fresh.keys.min()) < -0.99
        and 0.99 < float(fresh.keys.max()) <= 1
    )
    assert float(fresh.keys.std()) == pytest.approx(3**-0.5, abs=0.01)


def test_what_prompts_add_is_an_attention_of_their_own_head_by_head(prompts):
    queries = torch.randn(2, 5, 32)
    heads = []
    for own in (slice(0, 16), slice(16, 32)):
        scores = queries[..., own] @ prompts.keys[:, own].T / 16**0.5
        heads.append(scores.softmax(-1) @ prompts.values[:, own])
    torch.testing.assert_close(prompts(queries), torch.cat(heads, dim=-1))


def test_it_is_added_before_the_output_projection_times_its_factor(family, prompts):
    attention, states = family.model.vision_model.encoder.layers[0].self_attn, torch.randn(2, 5, 32)
    factor = torch.tensor([0.5, 0.0])
    with torch.no_grad():
        plain = attention(states)[0]
        with prompted([attention], [prompts], lambda number: factor):
            found = attention(states)[0]
        expected = (
            plain + (factor[:, None, None] * prompts(attention.q_proj(states))) @ attention.out_proj.weight.T
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[1], plain[1]), "with a weight of 0 nothing changes, bit for bit"


def test_a_gate_is_drawn_in_training_with_a_gradient_and_is_the_likelier_choice_else():
    torch.manual_seed(0)
    gate, image = Gate(4, 3.0), torch.randn(4000, 4)
    drawn = gate.train()(image)
    drawn.sum().backward()
    assert set(drawn.tolist()) == {0.0, 1.0} and gate.weight.grad.any() and gate.bias.grad.any()
    logits = image @ gate.weight.detach().T
    # The argmax of logits with Gumbel noise has the logits' softmax as its distribution, whatever the temperature.
    assert float(drawn.detach().mean()) == pytest.approx(float(logits.softmax(1)[:, 1].mean()), abs=0.03)
    assert torch.equal(gate.eval()(image), (logits[:, 1] > logits[:, 0]).float())


# --- Gaussians -----------------------------------------------------------------------------------


def test_log_densities_are_those_of_multivariate_normals():
    torch.manual_seed(0)
    groups, x = [torch.randn(n, 5) * scale for n, scale in ((40, 0.3), (9, 2.0), (3, 1.0))], torch.randn(7, 5)
    found = Gaussians.fit(groups, 1e-3).log_density(x, 0.5)
    for column, rows in zip(found.T, groups):
        covariance = torch.cov(rows.double().T) + 1e-3 * torch.eye(5)
        expected = MultivariateNormal(rows.double().mean(0), covariance * 0.5).log_prob(x.double())
        torch.testing.assert_close(column, expected, atol=1e-3, rtol=1e-4)


def test_a_single_vector_has_the_ridge_as_its_covariance():
    row = torch.randn(1, 5)
    found = Gaussians.fit([row], 1e-3)
    torch.testing.assert_close(found.factors[0] @ found.factors[0].T, 1e-3 * torch.eye(5))
    assert torch.equal(found.means, row)


# --- on the model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(teach):
    return teach(method())


def test_fresh_prompts_are_clip_exactly_in_training(family, data, contexts, batch_of):
    own, task = method(), family.task(data[0].recipe)
    own.load_state_dicts([{}])
    with torch.no_grad():
        with own.training_context(contexts(1), family.model):
            inside = task.train()(**batch_of(0))["logits"]
            task.eval()
        assert torch.equal(inside, task(**batch_of(0))["logits"])


def test_fresh_prompts_answer_as_clip_does_exactly(family, taught):
    states = [
        {k: torch.zeros_like(v) if k.endswith("values") else v for k, v in state.items()}
        for state in taught.method.states
    ]
    own = method()
    own.load_state_dicts(states)
    own.routes = lambda image: [Route(1)] * len(image)
    predictor = own.predictor(taught.predictor(1, base=True), "stripes")
    examples = [taught.data[1][i] for i in range(8)]
    assert torch.equal(predictor.logits(examples), taught.predictor(1, base=True).logits(examples))


def test_without_weight_or_with_closed_gates_the_images_are_clips_bit_for_bit(taught):
    model, plain = taught.family.model, taught.predictor(0, base=True)
    pixels = plain.inputs([taught.data[0][i] for i in range(6)])["pixel_values"]
    with torch.no_grad():
        base = image_features(model, pixels)
        with taught.method.engaged(model, 0, base, torch.zeros(6), 1.0):
            assert torch.equal(image_features(model, pixels), base)
        with taught.method.engaged(model, 0, base, torch.ones(6), 1.0):
            assert not torch.allclose(image_features(model, pixels), base, atol=1e-3)
        for gate in taught.method._prompts[0].gates:
            gate.bias += torch.tensor([100.0, 0.0])
        with taught.method.engaged(model, 0, base, torch.ones(6), 1.0):
            assert torch.equal(image_features(model, pixels), base)
    taught.method.load_state_dicts(taught.method.states)


def test_the_gates_of_training_read_the_features_of_clip_without_the_prompts(
    family, data, contexts, batch_of
):
    own, batch, seen = method(), batch_of(0), []
    own.load_state_dicts([{}])
    with torch.no_grad():
        expected = image_features(family.model, batch["pixel_values"])
        with own.training_context(contexts(1), family.model):
            for p in own._trained.parameters():
                p += 0.5
            own._trained.gates[1].register_forward_hook(lambda module, args, output: seen.append(args[0]))
            out = [family.task(data[0].recipe)(**batch)["image"] for _ in range(2)]
    assert (
        len(seen) == 2
        and all(torch.equal(one, expected) for one in seen)
        and not torch.allclose(out[0], expected, atol=1e-3)
    )


def test_all_layers_of_the_image_encoder_have_prompts_and_the_first_of_the_text_encoder(family, contexts):
    own = method(text_layers=1, prompts=3)
    own.load_state_dicts([{}])
    with own.training_context(contexts(1), family.model):
        shapes = {name: tuple(value.shape) for name, value in own.extra_state().items()}
    vision = {f"vision.{i}.{name}": (3, 32) for i in (0, 1) for name in ("keys", "values")}
    gates = {
        f"gates.{i}.{name}": shape for i in (0, 1) for name, shape in (("weight", (2, 16)), ("bias", (2,)))
    }
    assert shapes == {**vision, **gates, "text.0.keys": (3, 32), "text.0.values": (3, 32)}


# --- routing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    """Function (kind, count, noise, seed) → unit features around the kind's own centre, in eight classes, and their labels."""

    def draw(kind, count, noise=0.05, seed=0):
        generator = torch.Generator().manual_seed(kind)
        centres = torch.randn(16, generator=generator) + 0.05 * torch.randn(8, 16, generator=generator)
        labels = torch.arange(count) % 8
        rows = centres[labels] + noise * torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
        return rows / rows.norm(dim=1, keepdim=True), labels

    return draw


@pytest.fixture(scope="module")
def image(pictures):
    """Of two known kinds, more of the second, some of them odd, and of an unknown one."""
    return torch.cat(
        [
            pictures(*own, seed=9)[0]
            for own in ((1, 20, 0.03), (1, 20, 0.1), (2, 30, 0.03), (2, 30, 0.1), (3, 10, 0.1))
        ]
    )


@pytest.fixture(scope="module")
def router(pictures, contexts):
    """Function (**options) → a method that has seen two kinds of images."""

    def build(**options):
        own = method(**options)
        own.load_state_dicts([{}, *(own.learn_route(contexts(1), *pictures(kind, 120)) for kind in (1, 2))])
        return own

    return build


@pytest.fixture(scope="module")
def by_hand(pictures, image):
    """Function (task) → (task, w) of each image by the formulas; by the classes of the task given, or else of its own."""
    known = [pictures(kind, 120) for kind in (1, 2)]

    def log_density(rows, ridge, scale):
        covariance = (torch.cov(rows.double().T) + ridge * torch.eye(16)) * scale
        return MultivariateNormal(rows.double().mean(0), covariance).log_prob(image.double())

    of_tasks = torch.stack([log_density(rows, 1e-7, 0.5) for rows, _ in known], dim=1)
    of_classes = [
        torch.stack([log_density(rows[labels == c], 1e-3, 0.1) for c in range(8)], dim=1)
        for rows, labels in known
    ]

    def compute(task=None):
        found = []
        for i, own in enumerate(of_tasks):
            chosen, w = int(own.argmax()) if task is None else task, float(torch.sigmoid(own.max() / 16 - 1))
            best = of_classes[chosen][i].sort().values[-5:].mean()
            found.append(
                (chosen, 0.0 if w < 0.2 else 1.0 if w > 0.8 else float(torch.sigmoid(best / 16 - 1)))
            )
        return found

    return compute


#: Half a hundredth, and rounding.
HALF = 0.00501


def test_task_and_weight_are_those_of_the_formulas_by_hundredths(router, image, by_hand):
    routes = router().routes(image)
    for route, (task, w) in zip(routes, by_hand(), strict=True):
        assert (route == ORIGINAL and w < HALF) or (
            route.task == task and route.image == route.text and abs(route.image - w) < HALF
        )
    assert sum(0 < route.image < 1 for route in routes) > 10, "all three cases are seen"
    assert sum(route.image == 1 for route in routes) > 10 and routes.count(ORIGINAL) >= 10


def test_a_batch_has_its_commonest_task_and_its_mean_weight_for_the_prompts_if_it_is_asked_for(
    router, image, by_hand
):
    routes = router(routing="batch").routes(image)
    expected = [w for _, w in by_hand(task=1)]
    assert len({(route.task, route.text) for route in routes}) == 1 and routes[0].task == 1
    assert abs(routes[0].text - sum(expected) / len(expected)) < 2 * HALF
    assert all(abs(route.image - w) < HALF for route, w in zip(routes, expected, strict=True))


def test_neighbours_matter_if_a_batch_has_one_task_and_else_they_do_not(router, image):
    assert router(routing="batch").routes(image)[:40] != router(routing="batch").routes(image[:40])
    assert router().routes(image)[:40] == router().routes(image[:40])


def test_fewer_than_five_classes_and_classes_of_one_image_have_a_weight_too(pictures, contexts):
    own, (rows, _) = method(low=0.0, high=1.0), pictures(1, 20)
    labels = torch.tensor([0] * 19 + [7])
    ctx = contexts(1)
    own.load_state_dicts([{}, own.learn_route(ctx, rows, labels)])
    assert ctx.report["classes"] == {"with pictures": 2, "with one": 1}
    routes = own.routes(rows)
    assert len(routes) == 20 and all(0.0 <= route.image <= 1.0 for route in routes)


# --- in a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_config, driven, tiny_tasks):
    training = {"optim": "sgd", "learning_rate": 5.0, "lr_scheduler_type": "cosine", "weight_decay": 0.0}
    methods = {"iap": {"training": training}}
    return driven(
        run_config(
            tmp_path_factory.mktemp("iap") / "run",
            methods=methods,
            tasks=[str(path) for path in tiny_tasks[:2]],
            parts=None,
        )
    )


def test_it_runs_by_the_published_settings_without_parts_and_keeps_prompts_and_gaussians(finished):
    assert not json.loads((finished / "config.json").read_text())["methods"]["iap"]["parts"]
    for folder in sorted((finished / "iap").glob("task-0[12]*")):
        kept, state = load_file(folder / "kept.safetensors"), load_file(folder / "state.safetensors")
        assert all(kept[f"{part}.{i}.values"].any() for part in ("vision", "text") for i in (0, 1))
        assert {name: tuple(value.shape) for name, value in state.items()} == {
            "task.means": (1, 16),
            "task.factors": (1, 16, 16),
            "classes.means": (4, 16),
            "classes.factors": (4, 16, 16),
        }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": 0}, "prompts must be at least 1.*got 0"),
        (
            {"text_layers": -1},
            "text_layers must not be negative .got -1.*set it to 0",
        ),
        ({"temperature": 0.0}, "temperature must be above 0 .got 0.0"),
        (
            {"low": 0.9},
            r"0 <= low <= high <= 1 .got 0.9 and 0.8",
        ),
    ],
)
def test_settings_that_are_none_are_refused(options, words):
    with pytest.raises(MethodError, match=words):
        method(**options)
