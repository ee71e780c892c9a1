"""The examples of docs/extending.md: they pass the checks, and a run reads and scores with them."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from llava_keeplora.config import parse_config
from llava_keeplora_eval.testing import check_metric
from llava_keeplora_recipes.testing import check_reader

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def task(tmp_path, mixed_tasks):
    """A recipe beside copies of the examples, its questions in CSV files."""
    for name in ("word_overlap.py", "csv_reader.py"):
        shutil.copy(DOCS / "examples" / name, tmp_path)
    shutil.copytree(mixed_tasks[0].parent / "images", tmp_path / "data/images")
    for split in ("train", "test"):
        rows = json.loads((mixed_tasks[0].parent / f"questions-{split}.json").read_text())
        lines = [f"{row['id']};{row['image']};What color?;{row['conversations'][1]['value']}" for row in rows]
        (tmp_path / f"data/{split}.csv").write_text("\n".join(["id;image;question;answer", *lines]) + "\n")
    source = {"format": "csv_reader.py:CsvReader", "path": "data", "delimiter": ";"}
    facts = dict(
        name="csv",
        version=1,
        kind="vqa",
        metric="word_overlap.py:word_overlap",
        licence="CC0-1.0",
        source=source,
    )
    path = tmp_path / "csv.yaml"
    path.write_text(yaml.safe_dump(facts | {"splits": {"train": "train.csv", "test": "test.csv"}}))
    return path


def test_the_examples_keep_the_promises_and_are_what_the_page_shows(task):
    check_metric(f"{task.parent / 'word_overlap.py'}:word_overlap")
    check_reader(task)
    page = (DOCS / "extending.md").read_text()
    metric = (DOCS / "examples/word_overlap.py").read_text()
    assert metric[metric.index("def overlap") :].strip() in page


def test_a_run_reads_and_scores_with_the_examples(task, llava_tree, driven, tmp_path):
    run = driven(parse_config(llava_tree(tmp_path / "run", tasks=[str(task)], methods={"seq-lora": {}})))
    scores = [json.loads(path.read_text())["csv"] for path in sorted(run.glob("seq-lora/task-*/scores.json"))]
    assert {score["metric"] for score in scores} == {"word_overlap:word_overlap"} and all(
        score["n"] for score in scores
    )
    journal = [json.loads(line) for line in (run / "seq-lora/journal.jsonl").read_text().splitlines()]
    plans = [entry["info"]["tasks"][0]["plugins"] for entry in journal if entry["stage"] == "PLANNED"]
    assert all(set(plan) == {"metric", "reader"} for plan in plans)
