"""The energy rule against hand-computed cases and a naive loop."""

import pytest
import torch


def naive(squared, energy, total, captured):
    reached, k = captured, 0
    while reached < energy * total and k < len(squared):
        reached += squared[k]
        k += 1
    return k


@pytest.mark.parametrize("energy", [0.05, 0.3, 0.6, 0.85, 0.99, 0.999])
def test_agrees_with_a_naive_loop(sub, energy):
    squared = torch.rand(50, dtype=torch.float64).sort(descending=True).values
    assert sub.energy_rank(squared, energy) == naive(squared.tolist(), energy, float(squared.sum()), 0.0)


def test_a_tie_is_enough(sub):
    squared = torch.tensor([2.0, 1.0, 1.0])
    assert sub.energy_rank(squared, 0.5) == 1
    assert sub.energy_rank(squared, 0.75) == 2
    assert sub.energy_rank(torch.ones(10), 0.3) == 3, "0.1 * 3 is not 0.3 in floating point, yet it is a tie"


def test_full_energy_needs_the_full_rank_and_never_more(sub):
    assert sub.energy_rank(torch.tensor([4.0, 3.0, 1.0]), 1.0) == 3
    assert sub.energy_rank(torch.tensor([4.0, 3.0, 0.0, 0.0]), 1.0) == 2
    third = torch.full((3,), 1.0 / 3.0)
    assert sub.energy_rank(third, 1.0, total=1.0 + 1e-6) == 3, (
        "a total that rounding pushed up asks for no fourth"
    )


def test_rounding_noise_in_the_tail_is_not_rank(sub):
    squared = torch.tensor([4.0, 3.0, 1e-15, -1e-15], dtype=torch.float64)
    assert sub.energy_rank(squared, 1.0) == 2


def test_captured_energy_counts_first(sub):
    squared = torch.tensor([3.0, 2.0, 1.0])
    assert sub.energy_rank(squared, 0.5, total=10.0, captured=5.0) == 0
    assert sub.energy_rank(squared, 0.8, total=10.0, captured=4.0) == 2
    assert sub.energy_rank(squared, 0.8, captured=4.0) == 2, "the default total includes what is captured"


def test_strict_rule_keeps_one_vector_fewer(sub):
    squared = torch.tensor([2.0, 1.0, 1.0])
    assert sub.energy_rank(squared, 0.75, strict=True) == 1
    assert sub.energy_rank(squared, 0.8, strict=True) == 2
    assert sub.energy_rank(squared, 0.1, strict=True) == 1, "but never fewer than one"


def test_nothing_needs_nothing(sub):
    assert sub.energy_rank(torch.zeros(4), 0.9) == 0
    assert sub.energy_rank(torch.zeros(0), 0.9) == 0


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.5, float("nan")])
def test_an_energy_outside_its_range_is_named(sub, energy):
    with pytest.raises(sub.EnergyError, match=r"energy must lie in \(0, 1\].*" + str(energy)):
        sub.energy_rank(torch.ones(3), energy)


def test_a_bad_total_is_named(sub):
    with pytest.raises(sub.EnergyError, match="total energy must be finite"):
        sub.energy_rank(torch.ones(3), 0.5, total=float("inf"))
    with pytest.raises(sub.NonFiniteError):
        sub.energy_rank(torch.tensor([float("nan")]), 0.5)


def test_the_guaranteed_room_is_left_by_every_weight_and_by_the_flattest_exactly(sub):
    for out_dim, in_dim, energy in ((6, 10, 0.55), (10, 6, 0.5), (8, 8, 1.0), (7, 7, 0.99)):
        room = sub.guaranteed_room(out_dim, in_dim, energy)
        assert in_dim - sub.energy_rank(torch.ones(min(out_dim, in_dim)), energy) == room
        weight = torch.randn(out_dim, in_dim, dtype=torch.float64)
        assert in_dim - sub.energy_rank(torch.linalg.svdvals(weight).square(), energy) >= room
