"""What a plan counts of a method that keeps statistics of earlier tasks: in training, in the pass that makes them, on disk."""

import pytest
import torch

from llava_keeplora.adapters import FullDelta
from llava_keeplora.config import parse_config
from llava_keeplora.methods import METHODS, find_layers
from llava_keeplora.methods.condu import Unified
from llava_keeplora.models import open_model
from llava_keeplora.plan import describe, make_plan
from llava_keeplora.plan.machine import Machine
from llava_keeplora.plan.plan import _Scenarios

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


# --- routers, ConDU and general data -------------------------------------------------------------


@pytest.fixture(scope="module")
def estimates(llava_tree, mixed_tasks):
    """Label → the estimate of a method; each stage is computed when it is asked for."""
    methods = {
        "mean": {"method": "merge"},
        "condu": {"method": "merge", "rule": "condu"},
        "nearest": {"method": "task-lora"},
        "given": {"method": "task-lora", "routing": "oracle"},
        "trained": {"method": "task-lora", "routing": "model"},
        "few": {"method": "replay", "general": str(mixed_tasks[2]), "general_examples": 3},
        "all": {"method": "replay", "general": str(mixed_tasks[2])},
        "open": {"method": "keeplora"},
        "wary": {"method": "keeplora", "rejection": 0.1},
    }
    tree = llava_tree("unset", methods=methods, tasks=[str(mixed_tasks[i]) for i in (0, 1)])
    return _Scenarios(parse_config(tree), Machine(1, 10**12)).at({})


def host(estimate, stage):
    return estimate.peak(stage).host


def test_prototypes_are_a_pass_of_features_and_a_row_of_every_task(estimates):
    nearest, given = estimates["nearest"], estimates["given"]
    width = 2 * nearest.family.model.config.text_config.hidden_size  # Means over image and question.
    assert [("features" in e.stages) for e in estimates.values()] == [
        False,
        True,
        True,
        False,
        False,
        False,
        False,
        True,
        True,
    ]
    examples = max(work.train for work in nearest.work)
    # The examples' features once more as one matrix, beside the first task's prototype.
    assert host(nearest, "features") == host(given, "load") - 4 * 2 * given.delta_numbers + 4 * width * (
        2 * examples + 1
    )
    assert [e.state_bytes(2) for e in (nearest, given)] == [2 * 4 * width, 0]
    answers = given.peak("evaluate").device
    assert 0.5 * answers <= nearest.peak("features").device <= 2 * answers


def test_rejection_adds_the_pass_and_the_rows_of_prototypes_and_answers_hold_no_update(estimates):
    nearest, open_, wary = (estimates[label] for label in ("nearest", "open", "wary"))
    rows = nearest.state_bytes(2)
    assert (open_.state_bytes(2), wary.state_bytes(2)) == (0, rows)
    assert host(wary, "train") - host(open_, "train") == rows // 2  # The first task's.
    assert host(wary, "evaluate") - host(open_, "evaluate") == rows
    of_directions, of_prototypes, both = (e.peak("features") for e in (open_, nearest, wary))
    assert both.device == max(of_directions.device, of_prototypes.device)
    assert both.host >= of_directions.host


def test_answers_of_updates_kept_apart_hold_all_of_them_and_condu_its_unified_change(estimates):
    mean, condu, given = (host(estimates[label], "evaluate") for label in ("mean", "condu", "given"))
    updates = 2 * 4 * estimates["condu"].delta_numbers
    assert given - mean == updates
    modules = estimates["condu"].changed.modules
    numbers = [
        sum(p.numel() for p in modules[n].parameters(recurse=False)) for n in estimates["condu"].changed.full
    ]
    numbers += [modules[n].weight.numel() for n in estimates["condu"].changed.adapted]
    # τ, two masks, and copies of both changes of the largest module.
    unified = (4 + 2) * sum(numbers) + 4 * 2 * 4 * max(numbers)
    assert condu - mean - updates - unified == estimates["condu"].state_bytes(2)


def test_what_condu_is_planned_to_hold_is_what_it_holds():
    unified, generator = Unified(), torch.Generator().manual_seed(0)
    shapes = {"first": (6, 4), "second": (8, 6)}
    for _ in range(3):
        unified.add(
            {n: FullDelta({"weight": torch.randn(*s, generator=generator)}) for n, s in shapes.items()}
        )
    held = sum(t.nbytes for change in unified._changes.values() for pair in change.values() for t in pair)
    dense = {name: 4 * rows * columns for name, (rows, columns) in shapes.items()}
    assert Unified.bytes(dense, 3) == (held, 4 * 3 * dense["second"])


def test_general_data_count_as_images_and_as_examples_that_a_step_may_have(estimates):
    few, every, mean = (estimates[label] for label in ("few", "all", "mean"))
    image = few.general.image_bytes
    assert few.general.train == 3 < every.general.train and image > 0
    assert few._images - mean._images == 3 * image
    assert every._images - mean._images == every.general.train * image
    assert every.trained is every.general and every._batch()["input_ids"].shape[1] == every.general.tokens
    assert few.trained is few.largest, "three of them are less than a whole batch of the tasks'"


def test_the_router_that_a_model_is_trained_to_be_is_kept_once_and_none_before_there_is_a_choice(estimates):
    trained, given = estimates["trained"], estimates["given"]
    numbers = sum(4 * layer.rank * sum(layer.module.weight.shape) for layer in trained.layers.values())
    assert [trained.state_bytes(tasks) for tasks in (1, 2, 3)] == [0, numbers, numbers]
    assert trained.state_growth == numbers, "what a task stores from the second one on"
    assert trained.stages == given.stages


@pytest.mark.parametrize("gpus", [0, 1])
def test_features_at_a_tasks_start_are_held_in_training_where_they_are_looked_up(run_tree, tiny_tasks, gpus):
    balanced = {"method": "keeplora", "preset": "balanced"}
    rows = {
        "none": {"method": "keeplora"},
        "kept": balanced,
        "cropped": {**balanced, "random_resized_crop": [0.5, 1.0]},
        "once": {**balanced, "training": {"num_train_epochs": [1, 0.5]}},
    }
    tree = run_tree("unset", tasks=[str(path) for path in tiny_tasks[:2]], training={"num_train_epochs": 2})
    estimates = _Scenarios(parse_config({**tree, "methods": rows}), Machine(gpus, 10**12)).at({})

    def held(label):
        peak = estimates[label].peak("train")
        return peak.host if gpus else peak.device

    width = estimates["kept"].family.model.config.projection_dim
    most = max(work.train for work in estimates["kept"].work)
    assert [held(label) - held("none") for label in rows] == [0, 4 * width * most, 0, 0]
