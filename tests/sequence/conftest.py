"""Runs without pictures, and what a run leaves behind as something to compare."""

import json
from pathlib import Path

import pytest

from llava_keeplora.files import file_hash
from llava_keeplora.sequence import runner

VOLATILE = {".lock", "config.json", "table.md", "report.html"}


@pytest.fixture
def drive(monkeypatch):
    """Function (config) → results, without drawing the report."""
    monkeypatch.setattr(runner, "write_run_report", lambda root: None)
    return runner.run


def journal_of(folder: Path) -> list[dict]:
    """A journal's entries without clock readings."""
    entries = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k != "seconds"} | {"info": {k: v for k, v in e["info"].items() if k != "seconds"}} for e in entries]


@pytest.fixture
def left_behind():
    """Function (run folder) → every file by relative path as its hash, journals as their entries."""

    def collect(root: Path) -> dict:
        files = sorted(p for p in Path(root).rglob("*") if p.is_file() and p.name not in VOLATILE and p.suffix != ".png")
        return {str(p.relative_to(root)): journal_of(p.parent) if p.name == "journal.jsonl" else file_hash(p) for p in files}

    return collect


@pytest.fixture(scope="session")
def one_label():
    """Changes that leave a run of one method."""
    return lambda label: {"methods": {label: {}}}
