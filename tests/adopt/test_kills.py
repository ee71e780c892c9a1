"""An adoption that is killed (SIGKILL) anywhere goes on, and ends with the files of one that was not."""

import importlib.util
import random
import shutil
import sys
from pathlib import Path

import pytest


def _faults():
    path = Path(__file__).parents[1] / "sequence/faults.py"
    spec = importlib.util.spec_from_file_location("faults", path)
    module = sys.modules.setdefault("faults", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


faults = _faults()


@pytest.fixture(scope="module")
def adoption(one_task_run, peft_adapter, run_tree, tiny_tasks, tmp_path_factory):
    """(function (folder) → a copy of a run of one task, with one more to adopt, as plain data; a folder in
    which that was done undisturbed; its number of moments)."""
    root = tmp_path_factory.mktemp("killed")
    adapter = peft_adapter(root / "adapter")

    def build(folder):
        shutil.copytree(one_task_run, folder)
        tasks = [str(task) for task in tiny_tasks[:2]]
        return run_tree(folder, tasks=tasks, adopted=[None, str(adapter)], methods={"keeplora": {}})

    return build, root / "whole", faults.start(build(root / "whole"), None, root / "log")


def learned(run: Path) -> dict[str, bytes]:
    """Relative path → content of every file of the methods, but the journals, which have the times."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.glob("*/**/*"))
        if path.is_file() and path.name != "journal.jsonl"
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_an_adoption_killed_anywhere_ends_with_the_same_files(adoption, tmp_path, seed):
    build, whole, moments = adoption
    tree, draw, kills = build(tmp_path / "run"), random.Random(seed), 0
    first = {n: c for n, c in learned(tmp_path / "run").items() if n.endswith((".safetensors", ".jsonl"))}
    while faults.start(tree, draw.randint(1, max(2, moments // 3)), tmp_path / "log") is None:
        kills += 1
        now = learned(tmp_path / "run")
        assert first.items() <= now.items(), "nothing that was learned before is lost"
    assert kills and learned(tmp_path / "run") == learned(whole)


@pytest.mark.slow
def test_an_adoption_killed_at_each_of_its_writes_ends_with_the_same_files(adoption, tmp_path):
    build, whole, moments = adoption
    expected = learned(whole)
    for moment in range(1, moments + 1):
        folder = tmp_path / str(moment)
        tree = build(folder)
        assert faults.start(tree, moment, tmp_path / "log") is None
        faults.start(tree, None, tmp_path / "log")
        assert learned(folder) == expected, (tmp_path / "log").read_text().splitlines()[-1]
        shutil.rmtree(folder)
    places = {tuple(line.split()) for line in (tmp_path / "log").read_text().splitlines()}
    assert {
        ("PREPARED", "file"),
        ("PREPARED", "rename"),
        ("TRAINED", "file"),
        ("TRAINED", "answers"),
    } <= places
