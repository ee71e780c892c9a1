"""What the routed methods share: each image is answered by its own route, and the model is the plain CLIP outside of a call."""

import pytest
import torch

from llava_keeplora.errors import MethodError
from llava_keeplora.methods import METHODS, routed
from llava_keeplora.methods.routed import ORIGINAL, Route
from llava_keeplora_eval.predictors import class_logits, image_features

ROUTED = ["moe-adapters", "iap"]
SMALL = {"moe-adapters": {"experts": 4, "bottleneck": 8, "code": 4}, "iap": {}}


def make(name, **options):
    return METHODS[name](METHODS[name].Options(**SMALL[name], **options))


@pytest.fixture(scope="module", params=ROUTED)
def taught(request, teach):
    return teach(make(request.param))


@pytest.fixture
def routes(taught, monkeypatch):
    """Function (routes) → every batch takes these, by its examples' number."""
    return lambda found: monkeypatch.setattr(taught.method, "routes", lambda image: found[: len(image)])


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_routes_to_no_task_are_the_frozen_clip_bit_for_bit(taught, routes):
    routes([ORIGINAL] * 24)
    assert torch.equal(taught.logits(0), taught.logits(0, base=True))


def test_every_image_is_answered_by_its_own_route(taught, routes):
    chosen = [ORIGINAL, Route(0), Route(1), Route(1, 0.5, 0.25)]
    routes([chosen[i % 4] for i in range(24)])
    mixed = taught.logits(1)
    for place, route in enumerate(chosen):
        routes([route] * 24)
        torch.testing.assert_close(mixed[place::4], taught.logits(1)[place::4], atol=1e-4, rtol=1e-5)
    routes([Route(0)] * 24)
    assert (mixed - taught.logits(1)).abs().amax(dim=1)[2::4].min() > 1e-3, "routes differ"


def test_both_encoders_of_a_route_are_the_tasks(taught, routes):
    """By hand: the features of images and prompts under the task's modules."""
    routes([Route(1)] * 24)
    found, plain, model = taught.logits(0), taught.predictor(0, base=True), taught.family.model
    pixels = plain.inputs([taught.data[0][i] for i in range(24)])["pixel_values"]
    with torch.no_grad(), taught.method.engaged(model, 1, image_features(model, pixels), torch.ones(24), 1.0):
        expected = class_logits(model, image_features(model, pixels), plain.prompt_features())
    assert torch.equal(found, expected) and not torch.allclose(found, taught.logits(0, base=True), atol=1e-3)


def test_an_image_is_answered_alike_in_any_batch(taught):
    whole = taught.logits(0)
    for size in (1, 5):
        parts = [taught.logits(0, range(start, min(start + size, 24))) for start in range(0, 24, size)]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-4, rtol=1e-5)


def test_the_model_is_as_before_after_every_call(taught):
    model = taught.family.model
    before, own, state = (
        hooks(model),
        set(dict(model.named_modules())),
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    taught.predictor(1).predict([taught.data[1][i] for i in range(4)])
    assert hooks(model) == before and set(dict(model.named_modules())) == own
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_no_examples_have_no_answers(taught):
    assert taught.predictor(0).predict([]) == []


@pytest.mark.parametrize("name", ROUTED)
def test_an_unknown_routing_is_refused(name):
    with pytest.raises(
        MethodError,
        match="routing must be one of sample, batch .got 'task'",
    ):
        make(name, routing="task")


@pytest.mark.parametrize("name", ROUTED)
def test_training_is_the_same_where_activations_are_recomputed(name, family, data, contexts, batch_of):
    """What is drawn, gates and noise, is drawn once."""
    gradients = []
    for recomputing in (False, True):
        method = make(name)
        method.load_state_dicts([{}])
        torch.manual_seed(0)
        with method.training_context(contexts(1), family.model):
            task = family.task(data[0].recipe).train()
            with torch.no_grad():
                for p in task.parameters():
                    if p.requires_grad:
                        p += 0.1
            if recomputing:
                task.activation_checkpointing_enable()
            torch.manual_seed(1)
            task(**batch_of(0))["loss"].backward()
            gradients.append({n: p.grad.clone() for n, p in task.named_parameters() if p.requires_grad})
            task.activation_checkpointing_disable()
            task.eval()
    assert gradients[0].keys() == gradients[1].keys() and any(g.any() for g in gradients[0].values())
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-5, rtol=1e-4)


def test_the_rows_of_all_processes_come_in_the_order_of_the_data(monkeypatch):
    rows = torch.arange(10.0)[:, None].expand(10, 2)
    for world in (1, 3, 12):
        shares = [list(rows[rank::world].split(2)) if len(rows[rank::world]) else [] for rank in range(world)]

        monkeypatch.setattr(routed, "all_gather_object", lambda own: shares)
        assert torch.equal(routed._gather_rows(shares[-1]), rows)
