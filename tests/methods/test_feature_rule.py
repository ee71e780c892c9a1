"""SplitLoRA's rank rule in KeepLoRA: the directions that minimise its objective, and at most those of ε_f."""

import pytest
import torch
from torch import nn

from llava_keeplora.errors import MethodError
from llava_keeplora.methods import METHODS, Layer, TaskContext
from llava_keeplora.subspace import SecondMoment, SketchedMoment, feature_directions

KeepLora = METHODS["keeplora"]
WIDTH, HELD, ALPHA = 16, 3, 2.0


@pytest.fixture
def features():
    """(features (n, in), a basis (in, k) of directions that are protected already)."""
    torch.manual_seed(0)
    X = torch.randn(200, WIDTH, dtype=torch.float64) * 0.8 ** torch.arange(WIDTH)
    return X, torch.linalg.qr(torch.randn(WIDTH, HELD, dtype=torch.float64)).Q


def published_rank(X, basis, tasks, alpha=ALPHA):
    """The number of residual directions that minimises t (1 − share inside the basis and them) − α (free) / d."""
    total = X.square().sum()
    inside = (X @ basis).square().sum()
    squared = torch.linalg.svdvals(X - X @ basis @ basis.T).square()
    objective = [
        tasks * (1 - float((inside + squared[:m].sum()) / total)) - alpha * (WIDTH - HELD - m) / WIDTH
        for m in range(WIDTH - HELD + 1)
    ]
    return objective.index(min(objective))


def learned(X, basis, tasks, energy=1.0, **options):
    """A method after task `tasks` whose features are X."""
    layer = Layer("layer", "vision", nn.Linear(WIDTH, 4), 2, 2.0, 0.5, energy)
    moment = SecondMoment(WIDTH)
    moment.add(X)
    method = KeepLora(KeepLora.Options(**options))
    method.bases = {"layer": basis.float()}
    ctx = TaskContext(tasks, "t", {"layer": layer}, None, lambda make, fraction: {"layer": moment}, 0, 10**9)
    method.after_task(ctx)
    return method.bases["layer"], ctx.report["feature_energy"]["layer"]


@pytest.mark.parametrize("tasks", [1, 3, 20])
def test_the_rule_minimises_the_published_objective_over_the_residual_directions(features, tasks):
    X, basis = features
    rank = published_rank(X, basis, tasks)
    assert 0 < rank < WIDTH - HELD
    grown, record = learned(X, basis, tasks, feature_rule="splitlora", plasticity=ALPHA)
    assert grown.shape[1] == HELD + rank
    expected = (
        (X @ basis).square().sum() + torch.linalg.svdvals(X - X @ basis @ basis.T)[:rank].square().sum()
    ) / X.square().sum()
    assert record["after"] == pytest.approx(float(expected), abs=1e-5)


def test_energy_feature_bounds_the_rule_and_the_default_is_energy_alone(features):
    X, basis = features
    bounded, _ = learned(X, basis, 20, energy=0.6, feature_rule="splitlora", plasticity=ALPHA)
    default, _ = learned(X, basis, 20, energy=0.6)
    assert bounded.shape == default.shape and bounded.shape[1] < HELD + published_rank(X, basis, 20)
    assert learned(X, basis, 1)[0].shape[1] == WIDTH, "all directions at ε_f 1"


def test_a_sketch_follows_the_rule_too_and_asks_for_no_second_pass(features):
    X, basis = features
    least = ALPHA / (3 * WIDTH)
    exact = feature_directions(X.T @ X, basis, 1.0, least=least)
    sketch = SketchedMoment(WIDTH, WIDTH, basis.float(), seed=0)
    sketch.add(X.float())
    found = sketch.directions(basis.float(), 1.0, least=least)
    assert found.rank == exact.rank == published_rank(X, basis, 3) and found.reached


def test_wrong_settings_are_refused():
    with pytest.raises(MethodError, match="feature_rule must be one of energy, splitlora"):
        KeepLora.Options(feature_rule="split")
    with pytest.raises(MethodError, match="preset 'released-clip' follows released code"):
        KeepLora.Options(feature_rule="splitlora", preset="released-clip")
    with pytest.raises(MethodError, match="plasticity must not be negative"):
        KeepLora.Options(plasticity=-1.0)
