"""A run whose tasks are scored by a metric from a file beside them: killed, resumed, extended, examined and exported."""

import json
from pathlib import Path

import pytest
import yaml

from llava_keeplora.doctor.run import examine_run
from llava_keeplora.errors import RunError, UserError
from llava_keeplora.journal import Journal
from llava_keeplora.saved_run import extended
from llava_keeplora_eval import EvalError

METRIC = '''"""Written for this test."""


def same_start(text, answers):
    """The prediction starts as an accepted text does."""
    return text[:1] in {answer[:1] for answer in answers}
'''


@pytest.fixture
def tasks(own_tasks):
    """Two of the tiny tasks, scored by a metric of a file beside them."""
    (own_tasks[0].parent / "starts_same.py").write_text(METRIC)
    for path in own_tasks[:2]:
        facts = yaml.safe_load(path.read_text()) | {"metric": "starts_same.py:same_start"}
        path.write_text(yaml.safe_dump(facts))
    return own_tasks


@pytest.fixture
def config(run_config, tasks, tmp_path):
    return run_config(tmp_path / "run", tasks=[str(path) for path in tasks[:1]], methods={"seq-lora": {}})


def faults(run):
    return [str(line) for line in examine_run(run) if isinstance(line, UserError)]


def test_a_run_scored_by_a_metric_of_its_own(config, tasks, drive, stopped, monkeypatch):
    append = Journal.append

    def stop(self, entry):
        append(self, entry)
        if entry.stage == "TRAINED":
            monkeypatch.setattr(Journal, "append", append)
            raise stopped

    monkeypatch.setattr(Journal, "append", stop)
    with pytest.raises(stopped):
        drive(config)
    drive(config)
    drive(extended(config.output_dir, str(tasks[1])))
    run, file = Path(config.output_dir), tasks[0].parent / "starts_same.py"
    scores = [json.loads(path.read_text()) for path in sorted(run.glob("seq-lora/task-*/scores.json"))]
    assert {score["metric"] for row in scores for score in row.values()} == {"starts_same:same_start"}
    sources = {score["metric_source"] for row in scores for score in row.values()}
    plan = next(
        entry
        for entry in Journal(run / "seq-lora/journal.jsonl").entries
        if entry.stage == "PLANNED" and entry.task
    )
    assert sources == {plan.info["tasks"][0]["plugins"]["metric"]}
    assert faults(run) == []

    file.write_text(METRIC.replace("[:1]", "[:2]"))
    with pytest.raises(RunError, match="colours.*plugins.metric"):
        drive(extended(run, str(tasks[1])))
    assert any("the metric of 'colours' is not what" in fault for fault in faults(run))
    file.rename(file.with_name("hidden.txt"))
    with pytest.raises(EvalError, match="is not installed"):
        drive(extended(run, str(tasks[1])))
    assert any("is not installed" in fault for fault in faults(run))
