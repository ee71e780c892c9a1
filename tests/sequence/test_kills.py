"""A run that is killed, again and again and anywhere, ends with the files of one that wasn't, bit for bit."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

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
