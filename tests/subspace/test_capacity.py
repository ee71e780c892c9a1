"""For how many more tasks a protected subspace leaves room, against going through the tasks one by one."""

from fractions import Fraction

import pytest

from llava_keeplora.subspace import room_left


def tasks_one_by_one(width, sizes, rank):
    k, growth, tasks = Fraction(sizes[-1]), Fraction(sizes[-1] - sizes[0], len(sizes) - 1), 0
    while width - k >= rank:
        k, tasks = k + growth, tasks + 1
    return tasks


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize(
    "sizes", [[0, 1], [3, 10], [3, 5, 6], [0, 0, 7], [10, 12, 20, 21], [30, 31], [5, 32]]
)
def test_the_tasks_that_fit_are_those_that_find_the_ranks_directions_when_each_adds_as_many_as_before(
    sizes, rank
):
    room = room_left(32, sizes, rank)
    assert room.left == 32 - sizes[-1] and room.tasks == tasks_one_by_one(32, sizes, rank)
    assert room.growth == pytest.approx((sizes[-1] - sizes[0]) / (len(sizes) - 1))


def test_a_subspace_that_does_not_grow_has_room_for_ever_unless_it_is_full_already():
    assert room_left(32, [20, 20, 20], 4).tasks is None
    assert room_left(32, [30, 30], 4).tasks == 0
