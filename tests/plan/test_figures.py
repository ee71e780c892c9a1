"""A plan's figures move the way they must, and are those of a real run where that says them."""

import functools
import json
import math
import time

import pytest
import torch
from torch import nn

from llava_keeplora.config import parse_config
from llava_keeplora.methods import find_layers
from llava_keeplora.methods.layers import unsure_layers
from llava_keeplora.models import open_model
from llava_keeplora.plan import describe, make_plan
from llava_keeplora.plan.linear_algebra import random_rank
from llava_keeplora.sequence import runner

pytestmark = pytest.mark.usefixtures("estimated_once")


@pytest.mark.slow
def test_a_sketched_gradient_takes_less_than_a_dense_one_and_leaves_training_alone(wide_tree, peaks):
    sketch, dense = (
        peaks(wide_tree(methods={"keeplora": {"gradient": kind}})) for kind in ("sketch", "dense")
    )
    assert sketch["gradient"] < dense["gradient"] and sketch["train"] == dense["train"]


@pytest.mark.slow
def test_less_memory_for_statistics_lowers_the_features_alone(wide_tree, peaks):
    much, little = dict(peaks(wide_tree())), dict(peaks(wide_tree(memory={"statistics_gb": 0.03})))
    assert much.pop("features") > little.pop("features") and much == little


@pytest.mark.slow
def test_an_int8_base_takes_less_than_a_plain_one_and_nf4_less_still(wide_tree, peaks):
    plain = peaks(wide_tree())
    eight, four = (peaks(wide_tree(model={"quantization": kind})) for kind in ("int8", "nf4"))
    assert four["load"] < eight["load"] < plain["load"]
    assert four["evaluate"] < eight["evaluate"] < plain["evaluate"]
    # An int8 layer keeps its input in several forms, so that training is not less where layers are as small as these.
    assert four["train"] < plain["train"]


def test_a_quantised_model_keeps_head_and_projector_whole_and_clip_its_projections(wide_tree, run_tree):
    from llava_keeplora.models.meta_model import QuantisedLinear

    for tree in (wide_tree(), run_tree("unset")):
        config = parse_config(tree | {"model": {**tree["model"], "quantization": "nf4"}})
        family = open_model(config.model)
        family.skeleton(torch.float32)
        linear = {
            name: module for name, module in family.model.named_modules() if isinstance(module, nn.Linear)
        }
        whole = {name for name, module in linear.items() if not isinstance(module, QuantisedLinear)}
        assert whole in (
            {"lm_head", "model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"},
            {"visual_projection", "text_projection"},
        )


def test_recomputed_activations_lower_training_and_the_gradient_pass(wide_tree, peaks):
    plain, checkpointed = peaks(wide_tree()), peaks(wide_tree(training={"gradient_checkpointing": True}))
    assert checkpointed["train"] < plain["train"] and checkpointed["gradient"] < plain["gradient"]
    assert checkpointed["features"] == plain["features"]


@pytest.mark.slow
def test_half_the_batch_lowers_training_and_the_gradient_pass(wide_tree, peaks):
    whole, half = peaks(wide_tree()), peaks(wide_tree(training={"per_device_train_batch_size": 4}))
    assert (
        half["train"] < whole["train"]
        and half["gradient"] < whole["gradient"]
        and half["load"] == whole["load"]
    )


def sharded(wide_tree, stage, **zero):
    sizes = {"reduce_bucket_size": 1e4, "stage3_max_live_parameters": 1e4, "overlap_comm": False}
    content = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": stage, **sizes, **zero},
    }
    return wide_tree(
        training={"deepspeed": content},
        methods={"seq-lora": {}},
        parts={"language": {"rank": 64, "alpha": 64}, "vision": None},
    )


@pytest.mark.slow
def test_every_stage_of_zero_takes_less_than_the_one_before_and_more_processes_less_still(wide_tree, peaks):
    on_four = [peaks(sharded(wide_tree, stage), 4)["train"] for stage in (1, 2, 3)]
    on_eight = [peaks(sharded(wide_tree, stage), 8)["train"] for stage in (1, 2, 3)]
    assert on_four[0] > on_four[1] > on_four[2]
    assert all(eight < four for eight, four in zip(on_eight, on_four, strict=True))


def test_what_zero_takes_to_the_host_is_not_on_the_device(wide_tree, peaks):
    on_device, on_host = sharded(wide_tree, 2), sharded(wide_tree, 2, offload_optimizer={"device": "cpu"})
    assert peaks(on_host, 2)["train"] < peaks(on_device, 2)["train"]
    on_device, on_host = (peaks(tree, 2).estimate.peak("train").host for tree in (on_device, on_host))
    assert on_host > on_device


@pytest.mark.parametrize(
    ("out_dim", "in_dim", "energy"), [(256, 256, 0.5), (128, 512, 0.85), (512, 128, 0.6), (256, 256, 0.99)]
)
def test_the_directions_of_a_random_weight_are_predicted(out_dim, in_dim, energy):
    from llava_keeplora.subspace import principal_basis

    weight = torch.randn(out_dim, in_dim, generator=torch.Generator().manual_seed(0))
    assert abs(principal_basis(weight, energy).rank - random_rank(out_dim, in_dim, energy)) <= 3


@pytest.mark.parametrize("family", ["clip", pytest.param("llava", marks=pytest.mark.slow)])
def test_steps_and_trained_parameters_are_those_of_a_run(family, run_tree, llava_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "write_run_report", lambda root: None)
    training = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "num_train_epochs": 1.5}
    build, count = (run_tree, 2) if family == "clip" else (llava_tree, 1)
    tree = build(tmp_path / "run", methods={"seq-lora": {}, "keeplora": {}}, training=training)
    config = parse_config({**tree, "tasks": tree["tasks"][:count]})
    plan = make_plan(config)
    assert plan.fits and plan.changes == {}
    runner.run(config)
    for method in plan.methods:
        lines = (tmp_path / "run" / method.label / "journal.jsonl").read_text().splitlines()
        infos = [entry["info"] for entry in map(json.loads, lines) if entry["stage"] == "TRAINED"]
        assert [info["steps"] for info in infos] == list(method.steps)
        assert {info["trained_parameters"] for info in infos} == {method.trainable}


def test_disk_and_stored_parameters_are_the_sum_of_the_layers_factors(wide_tree):
    config = parse_config(wide_tree(methods={"seq-lora": {}}))
    plan, family = make_plan(config), open_model(config.model)
    family.skeleton(torch.float32)
    layers = find_layers(config.methods["seq-lora"].parts, family)
    factors = sum(
        4 * (m.in_features + m.out_features) for n, m in layers.modules.items() if n in layers.adapted
    )
    whole = sum(p.numel() for m in layers.full.values() for p in m.parameters())
    (method,) = plan.methods
    assert method.stored == method.trainable == factors + whole
    # Eight answers of some 170 bytes are all else that a task leaves.
    assert 0 < method.disk_task - 4 * method.stored < 8 * 250


@pytest.mark.slow
def test_seven_billion_parameters_are_planned_within_a_minute_without_weights(seven_b_tree):
    start = time.process_time()
    plan = make_plan(parse_config(seven_b_tree(1, "nf4", gradient_checkpointing=True)), 1, 24.0)
    assert time.process_time() - start < 60
    assert plan.fits
    (method,) = plan.methods
    # 4 x (4096 + 4096) + 3 x (4096 + 11008) per layer and rank; the projector's two layers with their biases.
    adapters, projector = 32 * 32 * (4 * 8192 + 3 * 15104), 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert method.stored == adapters + projector
    assert method.trainable == 32 * 32 * (4 * 4096 + 2 * 11008 + 4096) + projector
    assert method.steps == (math.ceil(20_000 / 64), math.ceil(8_001 / 64))
    # A once more as the start of the adapters, and 2 % of the input width as new directions.
    new = 32 * (6 * 4096 * round(0.02 * 4096) + 11008 * round(0.02 * 11008))
    answers = 3_000 * (160 + 4 * 32)
    assert method.disk_task == 4 * (method.stored + 32 * 32 * (6 * 4096 + 11008) + new) + answers
    # bf16 halves of embeddings, head, projector and vision; half a byte and its scales for each quantised weight.
    assert plan.model == pytest.approx(
        2 * (2 * 32064 * 4096 + projector)
        + (0.5 + 1 / 64) * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 24 * 12 * 1024**2),
        rel=0.01,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "llava"])
def test_a_run_in_fp16_is_planned_like_one_in_bf16(run_tree, wide_tree, peaks, family):
    tree = functools.partial(run_tree, "unset") if family == "clip" else wide_tree
    half, brain = (peaks(tree(methods={"keeplora": {}}, training={kind: True})) for kind in ("fp16", "bf16"))
    assert half.keys() == brain.keys() and all(
        abs(half[stage] - size) <= 0.02 * size for stage, size in brain.items()
    ), (half, brain)


@pytest.mark.slow
def test_a_rank_that_the_weights_decide_on_is_named_and_one_that_fits_any_weight_is_not(wide_tree, peaks):
    def tree(rank):
        part = {"rank": rank, "alpha": 1, "energy_weight": 0.5}
        return wide_tree(parts={"language": part, "vision": None, "connector": None})

    def notes(rank):
        plan = make_plan(parse_config(tree(rank)))
        return [method.unsure for method in plan.methods], describe(plan)

    sentences, text = notes(1)
    assert sentences == [""] and "base stage" not in text
    half = peaks(tree(1)).estimate.family.config.text_config.hidden_size // 2
    # Half the energy of a weight is held by at most half of its directions, whatever the spectrum.
    assert not list(unsure_layers(peaks(tree(half)).estimate.layers.values()))
    ((sentence,), text) = notes(half + 1)
    assert sentence in text and f"rank {half + 1} fits layer model.language_model.layers.0." in sentence
