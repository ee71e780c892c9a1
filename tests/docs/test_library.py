"""docs/library.md: its examples run, one after the other, and give what the page says."""

import contextlib
import copy
import re
from pathlib import Path

import pytest
import torch
from tests.memory.conftest import make_text_model, text_batches
from tests.memory.test_trainers import make_tokenizer

from llava_keeplora.export import verify
from llava_keeplora.models import ASSETS
from shorter_runs import reload_here

PAGE = (Path(__file__).parents[2] / "docs/library.md").read_text()


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the examples of the first heading leave behind."""
    names: dict = {}
    section = PAGE.split("\n## A run as an object\n")[1].split("\n## ")[0]
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(tmp_path_factory.mktemp("library")):
        patch.setattr(verify, "verify_in_fresh_process", reload_here)
        patch.setattr("llava_keeplora.sequence.runner.write_run_report", lambda root: None)
        for block in re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S):
            exec(block.replace("openai/clip-vit-base-patch16", str(ASSETS / "tiny-clip")), names)
        yield names


def test_the_examples_give_what_the_page_says(names):
    assert list(names["frame"].index.names) == ["method", "after"] and list(names["frame"]) == [
        "warm",
        "cold",
    ]
    assert "transfer" in names["totals"].columns and names["figure"].axes
    assert names["exported"].form == "merged" and names["exported"].tasks == 3
    assert set(names["answers"]) <= {"red", "orange", "pink"} and len(names["answers"]) == 12
    assert names["run"].tasks == ["digits"] and names["run"].objects.callbacks


def loss(model, batch):
    x, y = batch
    return torch.nn.functional.cross_entropy(model(x), y)


def test_the_method_without_the_driver_runs_in_the_loops_of_the_page(tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llava_keeplora.memory.matrix_callback.write_report", lambda *args, **settings: None)
    torch.manual_seed(0)
    model = make_text_model()
    tasks = ("sort", "add")
    data = [[(torch.randn(8, 12), torch.randint(0, 4, (8,))) for _ in range(3)] for _ in tasks]
    names = {
        "torch": torch,
        "network": torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)),
        "loss": loss,
        "first_task": data[0],
        "second_task": data[1],
        "base": copy.deepcopy(model),
        "model": model,
        "tokenizer": make_tokenizer(),
        "datasets": {task: Dataset.from_dict({"text": ["a b c d", "e f g h"]}) for task in tasks},
        "batches": {task: text_batches(seed, count=1) for seed, task in enumerate(tasks)},
        "scores": {task: lambda model: 50.0 for task in tasks},
    }
    section = PAGE.split("\n## The method without the driver\n")[1]
    first, *rest = re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)
    exec(first, names)
    assert len(names["memory"].tasks) == 2 and names["network"] is names["memory"].model
    for block in rest:
        exec(block, names)
    assert [task.name for task in names["memory"].tasks] == list(tasks)
    assert names["callback"].matrices["keeplora"].rows == [[50.0, 50.0]] * 2
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in names["base"].state_dict().items()
    )
