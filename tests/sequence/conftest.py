"""Runs without plots, and what a run leaves behind as something to compare."""

import gc
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from doors import Begun
from llava_keeplora.config import parse_config
from llava_keeplora.journal import Journal
from llava_keeplora.run_folder import REPORT_JSON
from llava_keeplora.sequence import runner, trainer
from llava_keeplora.sequence.workspace import Workspace
from llava_keeplora_eval import predictions
from llava_keeplora_eval.files import file_hash

VOLATILE = {".lock", ".report", "config.json"}
#: Endings of what a report writes from the rest.
REPORT = {".html", ".md", ".tex", ".csv", ".png", ".svg"}
#: What a stage's entry says of the machine rather than of the run.
MEASURED = {"seconds", "test_seconds", "peak_bytes", "peak_of"}


@pytest.fixture
def drive(monkeypatch):
    """Function (config) → results, without drawing the report."""
    monkeypatch.setattr(runner, "write_run_report", lambda root: None)
    return runner.run


class Stopped(Exception):
    """Stands for a kill."""


@pytest.fixture
def stopped():
    """What to raise for a kill."""
    return Stopped


@pytest.fixture
def stop_at_every_stage(monkeypatch):
    """Function (when) → every journal entry stops the run once, before or after it is written."""

    def begin(when: str) -> None:
        append, seen = Journal.append, set()

        def stop(self, entry):
            key = (self.path, len(self.entries), entry.stage)
            first = key not in seen
            seen.add(key)
            if when == "after":
                append(self, entry)
            if first:
                raise Stopped
            append(self, entry)

        monkeypatch.setattr(Journal, "append", stop)

    return begin


@pytest.fixture
def run_to_the_end(drive):
    """Function (config) → how many starts it took: start again and again until the run ends."""

    def start(config) -> int:
        for starts in range(1, 200):
            try:
                drive(config)
                return starts
            except Stopped:
                continue
        raise AssertionError("the run does not end")

    return start


@pytest.fixture
def stop_within_training(monkeypatch):
    """Function (step) → the tasks stopped so far: each task's training is stopped once, after that step."""

    def stop_at(step: int) -> list[int]:
        tasks, on_step_end = [], trainer._AfterStep.on_step_end

        def stop(self, args, state, control, **kwargs):
            on_step_end(self, args, state, control, **kwargs)
            if state.global_step == step and self.ctx.index not in tasks:
                tasks.append(self.ctx.index)
                raise Stopped

        monkeypatch.setattr(trainer._AfterStep, "on_step_end", stop)
        return tasks

    return stop_at


def journal_of(folder: Path) -> list[dict]:
    """A journal's entries without what is measured of the machine."""
    entries = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in e.items() if k != "seconds"}
        | {"info": {k: v for k, v in e["info"].items() if k not in MEASURED}}
        for e in entries
    ]


@pytest.fixture
def left_behind():
    """Function (run folder) → every file but the report's by relative path as its hash, journals as their entries."""

    def collect(root: Path) -> dict:
        files = sorted(
            p
            for p in Path(root).rglob("*")
            if p.is_file() and p.name not in (*VOLATILE, REPORT_JSON) and p.suffix not in REPORT
        )
        return {
            str(p.relative_to(root)): journal_of(p.parent) if p.name == "journal.jsonl" else file_hash(p)
            for p in files
        }

    return collect


@pytest.fixture(scope="session")
def llava_config(llava_tree):
    """Function (output_dir, **changes) → `RunConfig`; see `llava_tree`."""

    def build(output_dir, **changes):
        gc.freeze()
        return parse_config(llava_tree(output_dir, **changes))

    return build


@pytest.fixture(scope="session")
def one_label():
    """Changes that leave a run of one method."""
    return lambda label: {"methods": {label: {}}}


@pytest.fixture(scope="session")
def three_tasks_run(run_config, driven, tmp_path_factory):
    """A folder with both methods on the three tiny tasks, run in one go; shared, so copy it before changing it."""
    return driven(run_config(tmp_path_factory.mktemp("three") / "run"))


@pytest.fixture(scope="session")
def two_tasks_run(run_config, driven, tmp_path_factory, tiny_tasks):
    """A folder with both methods on the first two tasks; shared, so copy it."""
    return driven(
        run_config(tmp_path_factory.mktemp("two") / "run", tasks=[str(path) for path in tiny_tasks[:2]])
    )


@pytest.fixture
def outcome(left_behind):
    """Function (run folder) → every file's hash but the journals', which tell the way too."""
    return lambda run: {
        name: value for name, value in left_behind(run).items() if not name.endswith("journal.jsonl")
    }


@pytest.fixture
def questions(tmp_path):
    """Function (train records, test records) → a recipe of questions; a record is (id, question, answer)."""

    def write(train, test):
        Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
        for split, rows in (("train", train), ("test", test)):
            records = [
                {
                    "id": i,
                    "image": "0.png",
                    "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}],
                }
                for i, q, a in rows
            ]
            (tmp_path / f"{split}.json").write_text(json.dumps(records))
        facts = dict(
            name="asked",
            version=1,
            kind="vqa",
            metric="exact_match",
            licence="MIT",
            source={"format": "llava_json", "path": "."},
        )
        (tmp_path / "asked.yaml").write_text(
            yaml.safe_dump(facts | {"splits": {"train": "train.json", "test": "test.json"}})
        )
        return tmp_path / "asked.yaml"

    return write


@pytest.fixture
def ends_where_it_begins(monkeypatch):
    """Starts end where they would claim the folder, and predictions where they would answer."""

    def begin(*args, **kwargs):
        raise Begun

    monkeypatch.setattr(Workspace, "claim", begin)
    monkeypatch.setattr(predictions, "predict_to_file", begin)
