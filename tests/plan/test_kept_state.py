"""What a plan counts of a method that keeps statistics of earlier tasks: in training, in the pass that makes them, on disk."""

import pytest
import torch

from llava_keeplora.config import parse_config
from llava_keeplora.methods import METHODS, find_layers
from llava_keeplora.models import open_model
from llava_keeplora.plan import describe, make_plan

LABELS = ("seq-lora", "ewc", "reglora")


@pytest.fixture(scope="module")
def config(wide_tree, mixed_tasks):
    tasks = [str(task) for task in mixed_tasks[:2]]
    methods = {name: {} for name in LABELS}
    return parse_config(wide_tree(methods=methods, tasks=tasks, training={"per_device_train_batch_size": 1}))


@pytest.fixture(scope="module")
def weights(config):
    """Numbers of every adapted weight."""
    family = open_model(config.model, config.evaluation)
    family.skeleton(torch.float32)
    layers = find_layers(config.methods["ewc"].parts, family).adapted.values()
    return [layer.module.out_features * layer.module.in_features for layer in layers]


@pytest.fixture(
    scope="module", params=[pytest.param(0, id="cpu", marks=pytest.mark.slow), pytest.param(1, id="gpu")]
)
def planned(request, config):
    """(whether on a GPU, label → its plan, the plan's text)."""
    plan = make_plan(config, *((1, 1000.0) if request.param else ()))
    return bool(request.param), {method.label: method for method in plan.methods}, describe(plan)


def peaks(plan):
    return {stage.stage: (stage.device, stage.host) for stage in plan.stages}


def test_training_holds_what_is_kept_of_earlier_tasks_and_one_dense_layer_more(planned, weights):
    gpu, plans, _ = planned
    free = peaks(plans["seq-lora"])["train"]
    for label, kept in (("ewc", 4 * sum(weights)), ("reglora", sum(4 * int(0.02 * n) for n in weights))):
        device, host = peaks(plans[label])["train"]
        more = device - free[0]
        # The product, its slope and a few copies of the largest layer, beside the adapters' gradients.
        assert 0.9 * kept <= more <= kept + 6 * 4 * max(weights) + 4 * plans[label].trainable, label
        assert host - free[1] == (kept if gpu else 0)


def test_the_pass_of_ewc_is_a_stage_of_its_own_and_holds_every_square(planned, weights):
    gpu, plans, text = planned
    assert "statistics" not in peaks(plans["seq-lora"]) and "statistics" not in peaks(plans["reglora"])
    device, host = peaks(plans["ewc"])["statistics"]
    assert device >= 4 * sum(weights) and (host >= 3 * 4 * sum(weights)) == gpu
    assert "statistics" in text


def test_a_task_takes_what_is_kept_on_disk(planned, weights):
    _, plans, _ = planned
    free = plans["seq-lora"].disk_task
    assert plans["ewc"].disk_task - free == 4 * sum(weights)
    assert plans["reglora"].disk_task - free == sum(4 * int(0.02 * n) for n in weights)


def test_methods_without_a_state_say_nothing_of_it():
    assert METHODS["seq-lora"](METHODS["seq-lora"].Options()).planned_state({}, 2) is None
