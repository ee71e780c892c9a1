"""A run that is killed, again and again and anywhere, ends with the files of one that wasn't, bit for bit."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

STAGES = {"PREPARED", "TRAINED", "CONSOLIDATED", "EVALUATED"}


def _faults():
    spec = importlib.util.spec_from_file_location("faults", Path(__file__).with_name("faults.py"))
    module = sys.modules.setdefault("faults", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


faults = _faults()


def trees(run_tree, llava_tree, tiny_tasks, mixed_tasks):
    training = {"training": {"save_steps": 1}}
    return {
        "clip": lambda folder: run_tree(folder, tasks=[str(task) for task in tiny_tasks[:2]], **training),
        "llava": lambda folder: llava_tree(folder, tasks=[str(task) for task in mixed_tasks[:2]], **training),
    }


@pytest.fixture(scope="module")
def undisturbed(run_tree, llava_tree, tiny_tasks, mixed_tasks, tmp_path_factory):
    """Function (family) → how to build a tree, a folder of an undisturbed run, and how many moments it had; each run once."""
    found = {}

    def get(family):
        if family not in found:
            folder = tmp_path_factory.mktemp(family)
            build = trees(run_tree, llava_tree, tiny_tasks, mixed_tasks)[family]
            found[family] = build, folder / "run", faults.start(build(folder / "run"), None, folder / "log")
        return found[family]

    return get


def killed_until_it_ends(tree, moments, seed, log, most=100) -> int:
    """Start again after every kill, the next one anywhere in what is left, but `most` times; returns the number of kills."""
    draw = random.Random(seed)
    for kills in range(101):
        fatal = draw.randint(1, max(2, moments // 3)) if kills < most else None
        if faults.start(tree, fatal, log) is not None:
            return kills
    raise AssertionError("the run does not end")


@pytest.mark.parametrize("family", ["clip", pytest.param("llava", marks=pytest.mark.slow)])
def test_a_run_killed_anywhere_ends_with_the_same_files(undisturbed, left_behind, tmp_path, family):
    build, whole, moments = undisturbed(family)
    assert killed_until_it_ends(build(tmp_path / "run"), moments, 0, tmp_path / "log", most=3) == 3
    assert left_behind(tmp_path / "run") == left_behind(whole)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "llava"])
def test_runs_killed_in_every_stage_and_within_everything_they_do_end_with_the_same_files(
    undisturbed, left_behind, tmp_path, family
):
    build, whole, moments = undisturbed(family)
    expected = left_behind(whole)
    for seed in range(1, 21):
        killed_until_it_ends(build(tmp_path / str(seed)), moments, seed, tmp_path / "log")
        assert left_behind(tmp_path / str(seed)) == expected, f"seed {seed}"
    places = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert {stage for stage, _ in places} >= STAGES
    assert {kind for _, kind in places} >= {
        "file",
        "rename",
        "journal",
        "answers",
        "batch",
        "step",
        "generation" if family == "llava" else "images",
    }
    assert ("TRAINED", "step") in {tuple(place) for place in places} and len(places) >= 40


@pytest.fixture
def guarded_tree(run_tree, tiny_tasks):
    """Function (folder) → a run that forgets: its second task shrinks, and is rolled back; its third shrinks."""

    def build(folder):
        tree = run_tree(folder, tasks=[str(task) for task in tiny_tasks], seed=1)
        tree["training"] |= {"learning_rate": 0.1, "num_train_epochs": 3}
        # At this confidence any drop that was measured breaks the limit.
        guard = {"old_tasks": {"max_drop": 0}, "confidence": 0.5, "on_failure": "shrink", "held_out": 0.3}
        return tree | {"methods": {"seq-lora": {}}, "guard": guard}

    return build


@pytest.mark.slow
def test_a_guard_killed_in_its_answers_while_it_shrinks_and_while_it_rolls_back_gives_the_same_verdicts(
    guarded_tree, left_behind, tmp_path
):
    log, places = tmp_path / "log", tmp_path / "places"
    whole = guarded_tree(tmp_path / "whole")
    assert faults.start(whole, None, places) is not None
    fatal = [
        ("GUARDED 0", "answers", 2),  # The noise of the base.
        ("GUARDED 2", "answers", 1),  # The model before, on held-out examples.
        ("GUARDED 2", "answers", 2),  # A smaller update that is tried.
        ("GUARDED 2", "file", 1),  # The verdict.
        ("SHRUNK 2", "journal", 1),
        ("SHRUNK 2", "move", 2),
        ("start", "move", 1),
        ("TRAINED 2", "file", 1),
        ("EVALUATED 2", "answers", 1),
        ("GUARDED 2", "file", 1),
        ("ROLLED_BACK 2", "journal", 1),
        ("ROLLED_BACK 2", "move", 1),
        ("start", "move", 1),
        ("SHRUNK 2", "move", 4),  # Of the task that has come into its place.
    ]
    tree = guarded_tree(tmp_path / "run")
    for place in fatal:
        assert faults.start(tree, place, log) is None, place
    assert faults.start(tree, None, log) is not None
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "whole")
    verdicts = json.loads((tmp_path / "run/guard.json").read_text())["methods"]["seq-lora"]
    assert [(v["task"], v["then"], "shrink" in v) for v in verdicts] == [
        ("colours", None, False),
        ("stripes", "rollback", True),
        ("corners", None, True),
    ]


@pytest.fixture
def rows_with_a_state(run_tree, tiny_tasks):
    """Function (folder) → a run of two methods that keep something of every task: ids of examples, and prototypes."""

    def build(folder):
        return run_tree(
            folder,
            tasks=[str(task) for task in tiny_tasks[:2]],
            methods={"replay": {"share": 0.3, "ratio": 0.5}, "task-lora": {}},
            training={"save_steps": 1},
        )

    return build


@pytest.mark.slow
def test_methods_with_a_state_of_their_own_killed_before_while_and_after_it_is_stored_end_with_the_same_files(
    rows_with_a_state, left_behind, tmp_path
):
    whole, tree = rows_with_a_state(tmp_path / "whole"), rows_with_a_state(tmp_path / "run")
    assert faults.start(whole, None, tmp_path / "places") is not None
    in_method = [
        ("TRAINED 1", "step", 2),
        ("CONSOLIDATED 1", "file", 1),  # Half of the state.
        ("CONSOLIDATED 1", "rename", 1),  # Whole, and without its name.
        ("CONSOLIDATED 1", "journal", 1),  # There, and not known to be.
        ("TRAINED 2", "batch", 2),  # In a batch with what was kept.
        ("CONSOLIDATED 2", "journal", 1),
        ("EVALUATED 2", "answers", 1),  # In answers that are routed by what was kept.
    ]
    for place in 2 * in_method:
        assert faults.start(tree, place, tmp_path / "log") is None, place
    assert faults.start(tree, None, tmp_path / "log") is not None
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "whole")
    for label, names in (("replay", {"replay"}), ("task-lora", {"prototypes"})):
        states = sorted((tmp_path / "run" / label).glob("task-0[12]*/state.safetensors"))
        assert [set(load_file(path)) for path in states] == [names, names]
