"""A guard in two processes, with and without ZeRO-2, gives the verdicts of one process."""

import json

import pytest

from llava_keeplora.config import parse_config
from zero_runs import ZERO

#: At this confidence any drop that was measured breaks the limit.
GUARD = {"old_tasks": {"max_drop": 0}, "confidence": 0.5, "on_failure": "shrink", "held_out": 0.3}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, "zero-2", "zero-3"])
def test_a_guard_in_two_processes_gives_the_verdicts_of_one(stage, run_tree, driven, in_two, tmp_path):
    tree = run_tree(tmp_path / "one", seed=1)
    tree["training"] |= {"learning_rate": 0.1, "num_train_epochs": 3}
    tree |= {"methods": {"seq-lora": {}}, "guard": GUARD}
    one = driven(parse_config(tree))
    code, err = in_two(tree, ZERO.get(stage))
    assert code == 3, err
    assert verdicts(tmp_path / "two") == verdicts(one)
    assert verdicts(one) == [("colours", None, 0), ("stripes", "rollback", 1), ("corners", None, 1)]


def verdicts(run):
    """(task, what follows, whether a smaller update was looked for)."""
    record = json.loads((run / "guard.json").read_text())["methods"]["seq-lora"]
    return [(verdict["task"], verdict["then"], int("shrink" in verdict)) for verdict in record]
