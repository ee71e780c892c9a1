"""docs/runs.md: its commands run, and the errors that it explains are those of the code."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from llava_keeplora import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/runs.md").read_text()


@pytest.fixture
def folder(run_config, tiny_tasks, tmp_path, monkeypatch):
    """A working directory with a run on one task and a task more."""
    from llava_keeplora.sequence import runner

    shutil.copytree(tiny_tasks[0].parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_run_report", lambda root: None)
        runner.run(run_config("runs/birds", methods={"keeplora": {}}, tasks=["colours.yaml"]))
    return tmp_path


@pytest.mark.usefixtures("undrawn")
def test_every_command_runs(folder, capfd):
    commands = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.M | re.S)
        for line in block.splitlines()
    ]
    assert len(commands) == 4
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, capfd.readouterr().err
    assert json.loads((folder / "runs/birds/keeplora/matrix.json").read_text())["tasks"] == [
        "colours",
        "corners",
    ]
    assert json.loads((folder / "runs/other/keeplora/matrix.json").read_text())["tasks"] == ["colours"]


def test_the_folder_is_as_described(folder):
    for name in re.findall(r"^  +([\w.-]+\.(?:jsonl?|md))", TEXT.split("```")[1], flags=re.M):
        assert name in ("report.html", "table.md", "results.json") or list(
            (folder / "runs/birds").rglob(name)
        ), name


def test_the_sentences_that_it_explains_are_in_the_code():
    source = "".join(
        path.read_text()
        for place in ("llava_keeplora", "eval", "data_recipes")
        for path in (ROOT / place).rglob("*.py")
    )
    sentences = [
        part
        for row in TEXT.splitlines()
        if row.startswith("| `")
        for text in re.findall(r"`([^`]+)`", row.split("|")[1])
        for part in text.split("...")
    ]
    for words in sentences:
        words = words.strip(" ()")
        if words not in ("cannot be used (Permission denied", "Read-only file system"):
            assert words in source, words
