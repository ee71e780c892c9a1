"""The identities of SplitLoRA: its rank rule, and adapters that read nothing that is protected."""

import math

import pytest
import torch
from torch import nn

from llava_keeplora.errors import MethodError
from llava_keeplora.methods import METHODS, Layer, TaskContext
from llava_keeplora.methods.splitlora import protected_directions, random_rows
from llava_keeplora.subspace import empty_basis

SplitLora = METHODS["splitlora"]
WIDTH, RANK = 12, 4


def layers(*names):
    module = nn.Linear(WIDTH, 5)
    return {name: Layer(name, "vision", module, RANK, float(RANK), 0.5, 0.9) for name in names}


def context(index, groups, rows, budget=10**9):
    """A task whose pass over the features adds the given rows to every group's statistic."""
    of = layers(*(name for names in groups for name in names))

    def features(make):
        statistics = make(groups)
        for names in groups:
            statistics[names[0]].add(rows[: len(rows) // 2])
            statistics[names[0]].add(rows[len(rows) // 2 :])
        return statistics

    return TaskContext(index, "t", of, None, features, index, budget)


def decaying(seed, decay=0.6):
    torch.manual_seed(seed)
    return torch.randn(50, WIDTH, dtype=torch.float64) * decay ** torch.arange(WIDTH)


@pytest.mark.parametrize("tasks", [1, 2, 5, 40])
@pytest.mark.parametrize("plasticity", [0.0, 0.3, 5.0, 20.0])
def test_the_rank_minimises_the_published_objective(tasks, plasticity):
    X = decaying(0)
    shares = torch.linalg.svdvals(X.T @ X) / torch.linalg.svdvals(X.T @ X).sum()
    objective = [
        tasks * (1 - float(shares[:n].sum())) - plasticity * (WIDTH - n) / WIDTH for n in range(1, WIDTH + 1)
    ]
    basis, share = protected_directions(X.T @ X, tasks, plasticity)
    assert basis.shape[1] == 1 + objective.index(min(objective))
    assert share == pytest.approx(float(shares[: basis.shape[1]].sum()), abs=1e-12)
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-6, rtol=0)


def test_a_reads_nothing_that_is_protected_and_shrinks_with_the_tasks():
    basis, _ = protected_directions(decaying(0).T @ decaying(0), 1, 0.3)
    assert basis.shape[1] > 1
    generator = torch.Generator().manual_seed(0)
    for task in (2, 5):
        A = random_rows(RANK, basis, task, generator)
        assert float((A.double() @ basis.double()).abs().max()) < 1e-7
        assert float(A.norm()) == pytest.approx(math.sqrt(RANK / 3) / task)
        assert torch.linalg.matrix_rank(A) == RANK
    first = random_rows(400, empty_basis(WIDTH), 1, generator)
    assert float(first.abs().max()) <= 1 / math.sqrt(WIDTH)
    assert float(first.norm()) == pytest.approx(math.sqrt(400 / 3), rel=0.02)


def test_layers_that_read_the_same_tensor_share_a_basis_which_comes_from_all_tasks_together():
    method, rows = SplitLora(SplitLora.Options(plasticity=2.0)), [decaying(0), decaying(1).flip(1)[:30]]
    states = [{}]
    for index, task in enumerate(rows, start=1):
        method.after_task(context(index, [["k", "v"], ["o"]], task.float()))
        states.append(method.state_dict())
    both = sum(task.T @ task / len(task) for task in rows)
    expected, _ = protected_directions(both, 2, 2.0)
    assert method.bases["k"] is method.bases["v"] and set(states[1]) == {
        "moment.k|v",
        "moment.o",
        "basis.k|v",
        "basis.o",
    }
    for basis in method.bases.values():
        torch.testing.assert_close(basis @ basis.T, expected @ expected.T, atol=1e-4, rtol=0)
    again = SplitLora(SplitLora.Options(plasticity=2.0))
    again.load_state_dicts(states)
    assert all(torch.equal(again.bases[name], method.bases[name]) for name in ("k", "v", "o"))
    assert torch.equal(again._moments["k|v"], method._moments["k|v"])
    inits = [one.init_adapters(context(3, [["k", "v"]], rows[0])) for one in (method, again)]
    assert torch.equal(inits[0]["k"].A, inits[1]["k"].A) and not torch.equal(inits[0]["k"].A, inits[0]["v"].A)
    held = method.holds(context(2, [["k", "v"], ["o"]], rows[0]), states[2])
    assert held.keys() == states[2].keys() and held["moment.o"].shape == (WIDTH, WIDTH)


def test_more_is_protected_with_every_task_and_a_full_layer_is_left_out():
    method = SplitLora(SplitLora.Options(plasticity=0.5))
    counts = []
    for index in range(1, 5):
        ctx = context(index, [["k"]], decaying(0).float())
        method.after_task(ctx)
        counts.append(ctx.report["capacity"]["k"]["k"])
    assert counts == sorted(counts) and counts[0] < counts[-1] == method.capacity()["k"]
    full = SplitLora(SplitLora.Options(plasticity=0.0))
    full.after_task(context(1, [["k"]], decaying(0).float()))
    with pytest.raises(MethodError, match="no adapted layer has a direction left.*raise plasticity"):
        full.init_adapters(context(2, [["k"]], decaying(0)))


def test_wrong_settings_and_too_little_memory_are_refused():
    with pytest.raises(MethodError, match="plasticity must not be negative"):
        SplitLora.Options(plasticity=-1.0)
    method = SplitLora(SplitLora.Options())
    needed = method.least_statistics(layers("a.k", "a.v", "b.k"))
    assert needed == 2 * 4 * WIDTH**2
    with pytest.raises(MethodError, match=r"second moments for task 't' take.*raise memory.statistics_gb"):
        method.after_task(context(1, [["k"]], decaying(0), budget=10))
