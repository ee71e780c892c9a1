"""The number of training examples of a task that a run uses (`data.train_examples`)."""

from collections import Counter

import pytest

from llava_keeplora.config import DataConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.start.tasks import load_splits
from llava_keeplora_recipes import load_recipe


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("shapes")


def test_fewer_training_examples_have_the_same_share_of_every_class_and_leave_the_test_split_whole(recipe):
    train, test = load_splits(DataConfig(), recipe)
    fewer, same = load_splits(DataConfig(train_examples=len(train) // 4), recipe)
    assert same.ids == test.ids and set(fewer.ids) < set(train.ids)
    whole, part = Counter(train.labels), Counter(fewer.labels)
    assert part == {label: round(count / 4) for label, count in whole.items()}


def test_what_is_held_out_does_not_depend_on_the_number_of_training_examples(recipe):
    train, held = load_splits(DataConfig(holdout=0.2), recipe)
    fewer, same = load_splits(DataConfig(holdout=0.2, train_examples=30), recipe)
    assert same.ids == held.ids and set(fewer.ids) < set(train.ids) and abs(len(fewer) - 30) <= 3


def test_more_than_there_are_is_all_of_them_and_a_negative_number_is_refused(recipe):
    every, more = (load_splits(DataConfig(train_examples=n), recipe)[0].ids for n in (0, 10**6))
    assert every == more
    with pytest.raises(ConfigError, match="train_examples must not be negative .got -1."):
        DataConfig(train_examples=-1)
