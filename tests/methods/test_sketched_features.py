"""Features that are sketched: what a pass holds, what is said where two passes don't suffice, and how a budget is shared."""

import gc
import logging

import pytest
import torch
from torch import nn

from llava_keeplora.methods import METHODS, Layer, TaskContext
from llava_keeplora.methods.presets import PaperRules, least_statistics
from llava_keeplora.subspace import SecondMoment, ShapeError, SketchedMoment

WIDTH, DIRECTIONS = 256, 40


def layers(*widths, energy_feature=0.99):
    return {
        f"l{i}": Layer(f"l{i}", "vision", nn.Linear(width, 8, bias=False), 4, 4.0, 0.3, energy_feature)
        for i, width in enumerate(widths)
    }


def held() -> int:
    return sum(
        one.image.nbytes + one.test.nbytes for one in gc.get_objects() if isinstance(one, SketchedMoment)
    )


@pytest.fixture
def consolidated():
    """Function (layers, x, budget) → the report of a task whose features x every layer reads, and what sketches held in each pass."""

    def run(found, x, budget, **options):
        passes = []

        def features(make, fraction):
            made = make([[name] for name in found])
            for statistic in made.values():
                statistic.add(x, None)
            gc.collect()
            passes.append(held())
            return made

        method = METHODS["keeplora"](METHODS["keeplora"].Options(**options))
        base, task = (
            TaskContext(i, "flat", found, None, features, seed=0, statistics_bytes=budget) for i in (0, 1)
        )
        method.after_task(base)
        method.after_task(task)
        return task.report, passes

    return run


@pytest.fixture
def flat():
    return torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(0))


def test_a_second_pass_holds_no_more_than_the_first(consolidated, flat):
    budget = 8 * 12 * WIDTH * DIRECTIONS
    report, passes = consolidated(layers(*[WIDTH] * 8), flat, budget)
    assert len(passes) == 2 and all(one["passes"] == 2 for one in report["feature_energy"].values())
    assert 0.9 * budget < passes[0] <= budget and passes[1] <= passes[0], (budget, passes)


def test_layers_whose_sketch_misses_the_energy_are_reported_with_the_cure_and_those_that_reach_it_are_not(
    consolidated, flat, caplog
):
    with caplog.at_level(logging.WARNING):
        report, _ = consolidated(layers(*[WIDTH] * 3), flat, 3 * 12 * WIDTH * DIRECTIONS)
    (line,) = [record.getMessage() for record in caplog.records]
    least = min(one["after"] for one in report["feature_energy"].values())
    assert (
        line.startswith("flat: the sketched features of 3 layers don't reach energy_feature; l")
        and f"certainly protects only {least:.3f} of 0.99" in line
    )
    assert line.endswith("Raise memory.statistics_gb, or lower energy_feature") and least < 0.99

    caplog.clear()
    few = flat[:, :8] @ flat[:8]
    with caplog.at_level(logging.WARNING):
        report, _ = consolidated(layers(*[WIDTH] * 3), few, 3 * 12 * WIDTH * DIRECTIONS)
    assert not caplog.records and all(one["after"] >= 0.99 for one in report["feature_energy"].values())


def test_the_rank_rule_takes_a_second_pass_where_the_first_may_have_missed_a_direction(
    consolidated, flat, caplog
):
    x = flat * torch.arange(1, WIDTH + 1) ** -0.5
    rule = {"feature_rule": "splitlora", "plasticity": 5.0, "protect_weights": False}
    exact, _ = consolidated(layers(WIDTH, energy_feature=1.0), x, 10**9, **rule)
    with caplog.at_level(logging.WARNING):
        report, passes = consolidated(layers(WIDTH, energy_feature=1.0), x, 12 * WIDTH * DIRECTIONS, **rule)
    (wanted,), (found,) = (one["feature_energy"].values() for one in (exact, report))
    assert len(passes) == found["passes"] == 2 and wanted["new"] - 2 <= found["new"] <= wanted["new"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert not found["reached"] and line == (
        "flat: the sketched features of 1 layers may have more directions that feature_rule: splitlora takes; "
        f"l0 certainly protects {found['after']:.3f} of their energy. Raise memory.statistics_gb"
    )


@pytest.mark.parametrize("spare", [0, 10_000, 400_000])
def test_sketches_share_their_budget_by_the_square_of_the_width_and_none_gets_less_than_the_smallest(spare):
    found = list(layers(64, 64, 64, 512).values())
    bases = {layer.name: torch.zeros(layer.module.in_features, 0) for layer in found}
    least = least_statistics(found)
    made = PaperRules.statistics([found[:3], found[3:]], bases, least + spare, 0)
    sizes = [made[layer.name].test.shape[1] for layer in found]
    assert all(isinstance(one, SketchedMoment) for one in made.values()) and len(set(sizes[:3])) == 1
    assert (
        min(sizes) >= 16
        and sum(12 * layer.module.in_features * size for layer, size in zip(found, sizes)) <= least + spare
    )
    if spare:
        assert sizes[3] > sizes[0]


def test_one_byte_less_than_the_smallest_sketches_is_refused_with_what_they_take():
    found = list(layers(256, 512).values())
    least = 12 * 16 * (256 + 512)
    assert least_statistics(found) == least
    with pytest.raises(
        ShapeError,
        match=f"sketches of 16 directions for each of 2 layers take at least {least} bytes, but the limit is {least - 1} bytes",
    ):
        PaperRules.statistics([[found[0]], [found[1]]], {}, least - 1, 0)


def test_what_fits_is_exact_and_layers_of_one_input_share_it():
    found = list(layers(64, 64, 128).values())
    whole = 4 * (64**2 + 128**2)
    made = PaperRules.statistics([found[:2], found[2:]], {}, whole, 0)
    assert (
        made["l0"] is made["l1"]
        and {type(one) for one in made.values()} == {SecondMoment}
        and made["l2"].dtype == torch.float32
    )
    assert PaperRules.statistics([found[:2], found[2:]], {}, 2 * whole, 0)["l2"].dtype == torch.float64


def test_the_estimate_of_every_sketched_layer_is_reported_in_a_debug_log_and_the_lowest_in_any(caplog):
    from llava_keeplora.methods.keeplora_log import log_gradient_estimates

    numbers = {
        f"l{i}": {"of_optimum": 1.0 - i / 100, "at_least": 0.99 - i / 100, "passes": 1 + i} for i in range(3)
    } | {"dense": {"captured": 0.5}}
    with caplog.at_level(logging.DEBUG, "llava_keeplora"):
        log_gradient_estimates("birds", numbers)
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [line for level, line in lines if level == "DEBUG"] == [
        f"birds, layer l{i}: A holds about {1.0 - i / 100:.3f}, at least {0.99 - i / 100:.3f}, of the best rank-r energy after {1 + i} passes"
        for i in range(3)
    ]
    ((_, told),) = [line for line in lines if line[0] == "INFO"]
    assert (
        told.startswith("birds: A of 3 layers")
        and "an estimated 0.980 of the best rank-r energy in the worst layer, l2" in told
        and told.endswith("0.970 is proven")
    )
