"""ε_w from the data: on made-up scores by the rule's words, and on real weights."""

import pytest
import torch
from torch import nn

from llava_keeplora.analysis.choose_energy import CANDIDATES, choose_energy


@pytest.fixture
def layer():
    """A layer whose singular values are all alike: an energy is a share of its 40 directions."""
    layer = nn.Linear(40, 40, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0))).Q)
    return layer.requires_grad_(False)


def scored(layer, by_energy):
    """A score that looks at the weight as it is: at which share of its energy is it cut?"""
    return lambda: by_energy[round(float(layer.weight.square().sum()) / 40, 2)]


@pytest.mark.parametrize(
    ("enough_from", "chosen"),
    [(0.1, 0.1), (0.3, 0.3), (0.95, 0.95)],
)
def test_the_smallest_energy_that_keeps_95_percent_of_the_score_is_chosen(layer, enough_from, chosen):
    scores = {1.0: 60.0} | {energy: 57.0 if energy >= enough_from else 56.9 for energy in CANDIDATES}
    choice = choose_energy({"l": layer}, 1, scored(layer, scores))
    assert (choice.energy, choice.score, choice.whole, choice.directions) == (chosen, 57.0, 60.0, chosen)


def test_an_energy_below_one_that_loses_too_much_is_no_choice_even_if_it_scores_well(layer):
    scores = {1.0: 60.0} | dict.fromkeys(CANDIDATES, 60.0) | {0.5: 40.0}
    assert choose_energy({"l": layer}, 1, scored(layer, scores)).energy == 0.6


def test_where_no_energy_keeps_enough_the_largest_with_room_is_chosen(layer):
    scores = {1.0: 60.0} | dict.fromkeys(CANDIDATES, 10.0)
    assert choose_energy({"l": layer}, 1, scored(layer, scores)).energy == 0.95
    assert choose_energy({"l": layer}, 5, scored(layer, scores)).energy == 0.8, (
        "0.9 leaves 4 of 40 directions"
    )
    assert choose_energy({"l": layer}, 40, scored(layer, scores)).energy == 0.1
