"""How much of the data a pass reads by itself: made-up streams of gradients and features, without a model."""

import pytest
import torch
from torch import nn

from llava_keeplora.errors import MethodError
from llava_keeplora.methods import shares
from llava_keeplora.methods.base import Layer, TaskContext
from llava_keeplora.methods.keeplora import KeepLora
from llava_keeplora.methods.layers import in_layer
from llava_keeplora.methods.shares import AUTO, Stretch, read_features, read_gradients, reading_sizes
from llava_keeplora.sequence.passes import _carry_on
from llava_keeplora.steps import Budget
from llava_keeplora.subspace import DenseGradient, GradientSketch, SecondMoment, SketchedMoment, empty_basis

WIDTH, RANK, COUNT, ENERGY = 24, 4, 1024, 0.95
MANY_EPOCHS = 100 * COUNT


class Stream:
    """A task whose examples have inputs x and output gradients dy, of one layer."""

    def __init__(self, x, dy, rank_of_process=0, world=1):
        self.x, self.dy, self.process, self.world, self.read = x, dy, rank_of_process, world, []

    def rows(self, share):
        rows = share.of(len(self.x)) if isinstance(share, Stretch) else list(range(len(self.x)))
        self.read += rows
        return rows[self.process :: self.world]

    def gradients(self, share, statistics):
        """Sum the mean gradient of what has been read, as the driver's pass does."""
        start, stop = (share.start, share.stop) if isinstance(share, Stretch) else (0, len(self.x))
        if start:
            _carry_on(statistics.values(), start / stop, self.process)
        rows = self.rows(share)
        for statistic in statistics.values():
            statistic.add(self.x[rows], self.dy[rows] / stop)
        return len(rows)

    def features(self, make, share=1.0):
        made = make([["layer"]])
        if isinstance(share, Stretch) and share.start:
            _carry_on(made.values(), 1.0, self.process)
        made["layer"].add(self.x[self.rows(share)], None)
        return made


def context(stream, seen=MANY_EPOCHS):
    layer = Layer("layer", "vision", nn.Linear(WIDTH, WIDTH), RANK, RANK, 0.5, ENERGY)
    budget = Budget(len(stream.x), 1, seen)
    return TaskContext(
        1, "t", {"layer": layer}, stream.gradients, stream.features, 3, 10**9, budgets=[budget]
    )


def low_rank(count=COUNT, noise=0.02, seed=0):
    """Examples whose gradients share `RANK` directions but for noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator)).Q
    code = torch.randn(count, RANK, generator=generator)
    x = code @ directions.T + noise * torch.randn(count, WIDTH, generator=generator)
    return x, code @ torch.randn(RANK, WIDTH, generator=generator)


def read_A(stream, ctx, make=lambda: DenseGradient(WIDTH, WIDTH)):
    statistics = {"layer": make()}
    share = read_gradients(ctx, statistics, {"layer": RANK}, AUTO, in_layer)
    return statistics["layer"], share


def read_M(stream, ctx, make=lambda: SecondMoment(WIDTH)):
    basis = empty_basis(WIDTH)
    moments, share = read_features(
        ctx,
        lambda groups: {"layer": make()},
        lambda name, statistic: statistic.directions(basis, ENERGY),
        {"layer": basis},
        AUTO,
    )
    return moments["layer"], share


def held_of(gradient, A):
    """The energy that A holds of a gradient, beside the best directions', in float64."""
    best = torch.linalg.svdvals(gradient.double())[:RANK].square().sum()
    return float((gradient.double() @ A.double()).square().sum() / best)


@pytest.mark.parametrize("sketch", [False, True])
def test_a_stationary_stream_is_read_in_part_and_its_A_holds_what_was_wanted(sketch):
    x, dy = low_rank()
    stream = Stream(x, dy)
    ctx = context(stream)
    make = (lambda: GradientSketch(WIDTH, WIDTH, 12)) if sketch else (lambda: DenseGradient(WIDTH, WIDTH))
    statistic, share = read_A(stream, ctx, make)
    record = ctx.report["gradient_share"]
    assert record["ended_by"] == "estimate" and share == Stretch(3, 0, record["examples"])
    assert record["examples"] <= COUNT // 2 and record["expected_loss"] <= 0.01
    assert held_of(dy.T @ x, statistic.directions(RANK).A) >= 0.99


@pytest.mark.parametrize("sketch", [False, True])
def test_a_stationary_stream_s_features_are_read_in_part_and_hold_what_was_wanted(sketch):
    x, dy = low_rank()
    stream = Stream(x, dy)
    ctx = context(stream)
    make = (lambda: SketchedMoment(WIDTH, 16)) if sketch else (lambda: SecondMoment(WIDTH))
    statistic, _ = read_M(stream, ctx, make)
    new = statistic.directions(empty_basis(WIDTH), ENERGY).new
    record = ctx.report["feature_share"]
    assert record["ended_by"] == "estimate" and record["examples"] <= COUNT // 2
    assert float((x @ new).square().sum() / x.square().sum()) >= ENERGY - 0.005


def test_what_was_read_is_summed_once_and_averaged_over_what_was_read():
    x, dy = low_rank()
    stream = Stream(x, dy)
    statistic, share = read_A(stream, context(stream))
    rows = share.of(COUNT)
    assert sorted(stream.read) == rows and len(set(rows)) == len(rows)
    torch.testing.assert_close(statistic.matrix, dy[rows].T @ x[rows] / len(rows), atol=1e-5, rtol=1e-4)


def test_data_sorted_by_kind_are_read_in_a_random_order_so_that_a_last_part_with_new_directions_is_seen():
    x, dy = low_rank()
    other, _ = low_rank(seed=1)
    x = torch.cat([x[: COUNT // 2], 3 * other[COUNT // 2 :]])
    stream = Stream(x, dy)
    ctx = context(stream)
    statistic, share = read_M(stream, ctx)
    assert 0.3 < sum(row >= COUNT // 2 for row in share.of(COUNT)) / share.stop < 0.7
    new = statistic.directions(empty_basis(WIDTH), ENERGY).new
    assert float((x @ new).square().sum() / x.square().sum()) >= ENERGY - 0.005


def test_what_no_sample_holds_no_estimate_sees():
    x, dy = low_rank()
    stream = Stream(x, dy)
    ctx = context(stream)
    _, share = read_M(stream, ctx)
    unread = next(row for row in range(COUNT) if row not in set(share.of(COUNT)))
    odd = x.clone()
    odd[unread] = 1000.0  # one example, with more energy than all others
    stream = Stream(odd, dy)
    blind = context(stream)
    statistic, _ = read_M(stream, blind)
    assert blind.report == ctx.report
    new = statistic.directions(empty_basis(WIDTH), ENERGY).new
    assert float((odd @ new).square().sum() / odd.square().sum()) < ENERGY - 0.005


def test_noise_is_read_to_the_end_and_then_nothing_is_lost():
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(COUNT, WIDTH, generator=generator) for _ in range(2))
    stream = Stream(x, dy)
    ctx = context(stream)
    read_A(stream, ctx)
    assert ctx.report["gradient_share"] == {
        "share": 1.0,
        "examples": COUNT,
        "expected_loss": 0.0,
        "allowed_loss": 0.01,
        "ended_by": "all data",
    }


def test_a_pass_costs_no_more_than_a_part_of_training_and_says_what_it_lacks():
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(COUNT, WIDTH, generator=generator) for _ in range(2))
    stream = Stream(x, dy)
    ctx = context(stream, seen=COUNT)
    read_A(stream, ctx)
    record = ctx.report["gradient_share"]
    assert record["ended_by"] == "cost" and record["share"] == 1 / 8 and record["expected_loss"] > 0.01
    read_M(stream, ctx)
    assert ctx.report["feature_share"]["share"] <= 1 / 4


def test_the_shares_are_the_same_for_every_number_of_processes_and_every_time():
    x, dy = low_rank()
    alone = Stream(x, dy)
    ctx = context(alone)
    statistic, share = read_A(alone, ctx)
    again, _ = read_A(alone, context(alone))
    assert torch.equal(statistic.matrix, again.matrix)
    parts = [DenseGradient(WIDTH, WIDTH) for _ in range(2)]
    streams = [Stream(x, dy, process, 2) for process in range(2)]
    start = 0
    for stop in [size for size in reading_sizes(COUNT, COUNT) if size <= share.stop]:
        for stream, part in zip(streams, parts):
            stream.gradients(Stretch(3, start, stop), {"layer": part})
        total = parts[0].matrix + parts[1].matrix  # what summing over processes leaves in both
        for part in parts:
            part.matrix.copy_(total)
        start = stop
    torch.testing.assert_close(parts[0].matrix, statistic.matrix)


@pytest.mark.parametrize(
    ("examples", "most", "sizes"),
    [
        (24, 3, [24]),
        (64, 64, [64]),
        (400, 50, [32, 64]),
        (1455, 181.9, [91, 181]),
        (1455, 363.8, [91, 182, 363]),
        (1000, 10**6, [125, 250, 500, 1000]),
    ],
)
def test_readings_double_up_to_the_limit_and_none_is_too_small(examples, most, sizes):
    assert reading_sizes(examples, most) == sizes


def test_a_context_that_cannot_choose_examples_reads_all_of_them():
    x, dy = low_rank()
    stream = Stream(x, dy)
    ctx = context(stream)
    ctx.budgets = ()
    assert read_A(stream, ctx)[1] == 1.0 and len(stream.read) == COUNT and not ctx.report


def test_released_code_reads_all_data_unless_the_user_says_otherwise():
    method = KeepLora(KeepLora.Options(preset="released-clip"))
    assert (method.gradient_fraction, method.feature_fraction) == (1.0, 1.0)
    assert KeepLora(KeepLora.Options()).gradient_fraction == AUTO
    with pytest.raises(MethodError, match="gradient_fraction must be auto or in"):
        KeepLora.Options(gradient_fraction="automatic")


def test_the_first_process_decides_for_all(monkeypatch):
    monkeypatch.setattr(shares, "all_gather_object", lambda lost: [0.0, lost])
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(COUNT, WIDTH, generator=generator) for _ in range(2))
    stream = Stream(x, dy)
    ctx = context(stream)
    read_A(stream, ctx)
    assert ctx.report["gradient_share"]["ended_by"] == "estimate"
