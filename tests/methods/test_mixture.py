"""Trainings on the data of several tasks: which examples a step has, and that its batches weigh as one."""

from collections import Counter

import pytest
import torch

from llava_keeplora.methods import METHODS
from llava_keeplora.methods.mixture import add_examples, mix_tasks, own_sizes
from llava_keeplora.sequence.mixed_data import SHARE, TASK, MixedData
from llava_keeplora.steps import Budget


class Rows:
    """Training data of a task whose batches are the rows themselves."""

    def __init__(self, weights):
        self.weights = weights

    def collate(self, rows):
        return {"rows": list(rows)}


def pairs(mixture):
    return list(zip(mixture.sources.tolist(), mixture.rows.tolist(), strict=True))


def test_joint_steps_see_every_example_as_often_as_alone_in_the_sum_of_the_steps():
    budgets = [Budget.of({"num_train_epochs": n, "per_device_train_batch_size": 4}, 10, 1) for n in (1, 2)]
    mixture = mix_tasks(budgets, 0)
    assert len(mixture.sizes) == 3 + 6 and int(mixture.sizes.sum()) == 30 and int(mixture.sizes.max()) <= 4
    counts = Counter(pairs(mixture))
    assert counts == {(task, row): task for task in (1, 2) for row in range(10)}
    first, second = (set(pairs(mixture)[part]) for part in (slice(0, 15), slice(15, 30)))
    assert {task for task, _ in first} == {task for task, _ in second} == {1, 2}
    again, other = mix_tasks(budgets, 0), mix_tasks(budgets, 1)
    assert pairs(again) == pairs(mixture) != pairs(other)


def test_a_limit_of_steps_repeats_a_task_and_part_of_a_pass_is_seen():
    limited = Budget.of({"max_steps": 5, "num_train_epochs": 1, "per_device_train_batch_size": 4}, 10, 1)
    assert limited.seen == 4 + 4 + 2 + 4 + 4 and own_sizes(limited).tolist() == [4, 4, 2, 4, 4]
    assert len(mix_tasks([limited], 0).sources) == 18


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_what_a_pass_drops_is_other_examples_each_time_and_as_many_as_the_trainer_drops(epochs):
    training = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 5,
        "dataloader_drop_last": True,
    }
    budgets = [Budget.of(training, size, 1) for size in (12, 9)]
    assert [(task.seen, task.steps, task.repeats) for task in budgets] == [
        (10 * epochs, 2 * epochs, epochs > 1),
        (5 * epochs, epochs, epochs > 1),
    ]
    joint, replayed = mix_tasks(budgets, 0), add_examples(1, budgets[0], [([(0, 0)], 1.0)], 0)
    assert joint.sources.tolist().count(1) == 10 * epochs and joint.sources.tolist().count(2) == 5 * epochs
    assert int(joint.sizes.sum()) == 15 * epochs and len(joint.sizes) == 3 * epochs
    for mixture in (joint, replayed):
        own = Counter(row for source, row in pairs(mixture) if source == 1)
        assert sum(own.values()) == 10 * epochs and max(own.values()) <= epochs
        assert len(own) == 10 if epochs == 1 else len(own) > 10
    assert own_sizes(budgets[0]).tolist() == [5, 5] * epochs


def test_added_examples_keep_the_steps_and_meet_the_ratio_over_all_of_them():
    budget = Budget(10, 4, 6)
    pool = [(1, 7), (2, 3), (1, 9)]
    mixture = add_examples(3, budget, [(pool, 0.3), ([], 1.0)], seed=5)
    own = [row for source, row in pairs(mixture) if source == 3]
    assert Counter(own) == dict.fromkeys(range(10), 2)
    added = [pair for pair in pairs(mixture) if pair[0] != 3]
    assert len(added) == 6 and Counter(added) == dict.fromkeys(pool, 2)
    assert len(mixture.sizes) == 6 and int(mixture.sizes.sum()) == 26
    alone = add_examples(3, budget, [], seed=5)
    assert [row for _, row in pairs(alone)] == own, (
        "earlier examples don't change the order of the task's own"
    )


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 5])
def test_a_steps_batches_are_of_one_task_and_weigh_as_one_mean_on_any_number_of_processes(world, size):
    budgets = [Budget(7, 6, 3), Budget(9, 6, 2)]
    weights = {1: list(range(1, 8)), 2: [3] * 9}
    mixture = mix_tasks(budgets, 2)
    data = MixedData(mixture, {task: Rows(own) for task, own in weights.items()}, {}, size, world)
    per_step = data.accumulation * world
    assert len(data) == len(mixture.sizes) * per_step
    start = 0
    for step, count in enumerate(mixture.sizes.tolist()):
        batches = [data.collate([step * per_step + number]) for number in range(per_step)]
        examples = pairs(mixture)[start : start + count]
        start += count
        counted = [(b[TASK], row) for b in batches if b[SHARE] for row in b["rows"]]
        assert sorted(counted) == sorted(examples) and all(len(b["rows"]) <= size for b in batches)
        # The mean over the step of a loss of its own for every example, as the Trainer takes it.
        loss = {pair: float(torch.sin(torch.tensor(10.0 * pair[0] + pair[1]))) for pair in examples}
        expected = sum(weights[t][r] * loss[t, r] for t, r in examples) / sum(
            weights[t][r] for t, r in examples
        )
        found = 0.0
        for b in batches:
            own = [(b[TASK], row) for row in b["rows"]]
            mean = sum(weights[t][r] * loss[t, r] for t, r in own) / sum(weights[t][r] for t, r in own)
            found += b[SHARE] * mean / per_step
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epochs", [0.5, 1, 3])
@pytest.mark.parametrize("examples", [1, 3, 7, 11])
def test_the_budget_of_replay_is_what_its_mixture_has(examples, epochs):
    own = Budget.of({"num_train_epochs": epochs, "per_device_train_batch_size": 4}, examples, 1)
    for ratio in (0.1, 0.5, 1.0, 2.5):
        added = [([(1, 0), (1, 1)], ratio), ([(0, 0)], 0.5)]
        replay = METHODS["replay"](METHODS["replay"].Options(ratio=ratio, general="it", general_ratio=0.5))
        assert replay.budget(2, [own, own]).seen == len(add_examples(2, own, added, 0).sources), ratio
