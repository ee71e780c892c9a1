"""docs/library.md: its examples run, one after the other, and give what the page says."""

import contextlib
import re
from pathlib import Path

import pytest

from llava_keeplora.export import verify, verify_worker
from llava_keeplora.models import ASSETS

PAGE = (Path(__file__).parents[2] / "docs/library.md").read_text()


def reload_here(folder):
    with contextlib.chdir(folder):
        verify_worker.main()


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
