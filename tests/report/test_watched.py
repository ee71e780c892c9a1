"""General ability: what a guard watches stands apart from the tasks, before, after every task, and by how much."""

import csv
import importlib
import json
from pathlib import Path

import pytest

from llava_keeplora.compare.run_table import TableResult
from llava_keeplora.compare.table import Order, Table
from llava_keeplora.compare.writers import sections_of
from llava_keeplora.files import write_json
from llava_keeplora.guard import WATCH
from llava_keeplora.report import Trial, write_report
from llava_keeplora.report.results import row_marks
from llava_keeplora.report.run_matrix import RunMatrix
from llava_keeplora.report.terminal import summary, trials_of_run
from llava_keeplora.report.watched import read_watched, stage_table, watched_header, watched_rows
from llava_keeplora_eval import Matrix

TASKS = ["a", "b", "c"]
MATRIX = Matrix(TASKS, [1.0] * 3, [[9.0, 1.0, 1.0], [8.0, 9.0, 1.0], [7.0, 8.0, 9.0]])
REST = {"outcome": "held", "limit": -9.0, "low": -1.0, "high": 1.0, "n": 9, "noise": 0.0, "fingerprint": "f"}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    module = importlib.import_module("llava_keeplora.report.write_report")
    monkeypatch.setattr(module, "OF_ALL", ())
    monkeypatch.setattr(module, "OF_ONE", ())


def trial(seed, *pope):
    """A run of three tasks with the scores of one watched recipe, and of another that never changes."""
    stages = dict(zip(("zero-shot", *TASKS), ({"pope": score, "faq": 50.0} for score in pope)))
    return Trial(MATRIX, seed=seed, watched=stages)


def test_the_scores_are_those_of_the_verdicts_and_a_rollback_repeats_the_row_before(tmp_path):
    places = {"a": "task-01-a", "b": "aside/01-b", "c": "task-02-c"}
    scores = {"a": (80.0, 78.0), "b": (78.0, 60.0), "c": (78.0, 79.0)}
    for task, (before, after) in scores.items():
        folder = tmp_path / places[task]
        folder.mkdir(parents=True)
        limits = [
            {"of": of, "task": name, "before": before, "after": after, "change": after - before} | REST
            for of, name in ((WATCH, "pope"), ("old task", "x"))
        ]
        verdict = {"task": task, "ship": True, "confidence": 0.95, "level": 0.95, "limits": limits}
        verdict["then"] = "rollback" if task == "b" else None
        (folder / "guard.json").write_text(json.dumps(verdict))
    assert read_watched(tmp_path, TASKS) == {
        "zero-shot": {"pope": 80.0},
        "a": {"pope": 78.0},
        "b": {"pope": 78.0},
        "c": {"pope": 79.0},
    }
    assert read_watched(tmp_path / "none", TASKS) == {}


def test_the_terminal_and_the_matrix_of_a_program_have_them_and_say_what_was_rolled_back(tmp_path):
    for place, task, score, then in (("task-01-a", "a", 78.0, None), ("aside/01-b", "b", 60.0, "rollback")):
        limit = {"of": WATCH, "task": "pope", "before": 80.0, "after": score, "change": score - 80.0}
        verdict = {"task": task, "limits": [limit | REST], "then": then}
        write_json(tmp_path / "lora" / place / "guard.json", verdict)
    matrix = RunMatrix.of(tmp_path, {"lora": MATRIX, "zero-shot": MATRIX})
    trials = trials_of_run(tmp_path, {"lora": MATRIX, "zero-shot": MATRIX})
    texts = [summary(tmp_path, trials), repr(matrix)]
    for text in texts:
        assert "| b (rolled back) | 8.0 | 9.0 | 1.0 |" in text and "| b | 78.0 |" in text
        assert text.count("pope (watched)") == 1
    assert "b (rolled back)" in (page := matrix._repr_html_()) and page.count("pope (watched)") == 1
    assert matrix.watched["lora"]["b"] == {"pope": 78.0} and matrix.watched["zero-shot"] == {}
    assert RunMatrix({"lora": MATRIX}).watched == {"lora": {}}


def test_the_terminal_has_them_of_every_one_of_several_runs(tmp_path):
    more = {"lora (one)": [trial(0, 80, 70, 60, 50)], "lora (two)": [trial(0, 80, 78), trial(1, 80, 74)]}
    text = summary(tmp_path, more)
    assert text.count("pope (watched)") == 2
    assert "lora (one): score in % on what the guard watches" in text and "| c | 50.0 |" in text
    assert "lora (two), mean of 2 seeds: score in % on what" in text and "| a | 76.0 ± 2.8 |" in text


def test_a_mark_of_some_seeds_says_of_how_many():
    trials = [
        Trial(MATRIX, marks=marks) for marks in ({"b": "rolled back"}, {}, {"b": "rolled back", "c": "x"})
    ]
    assert row_marks(trials) == {"b": "rolled back in 2 of 3", "c": "x in 1 of 3"}
    assert row_marks(trials[:1]) == {"b": "rolled back"}


def test_every_order_of_a_table_of_runs_has_them_in_a_section_of_its_own():
    results = {"I": {"lora": [trial(0, 80, 70, 60, 50)]}, "II": {"lora": [Trial(MATRIX, seed=0)]}}
    orders = tuple(Order(name, {"tasks": TASKS}, (0,)) for name in results)
    table = Table(Path("table"), {}, {"lora": {}}, orders)
    sections = sections_of(table, TableResult(results, [], {"lora": {}}, []))
    (section,) = [s for s in sections if "general ability" in s.title]
    assert section.title == "Order I: general ability" and section.header[1] == "pope before"
    assert section.rows == [["lora", "80.0", "50.0", "-30.0", "50.0", "50.0", "0.0"]]
    assert all("pope" not in " ".join(s.header) for s in sections if s is not section)


def test_before_after_and_change_are_means_over_seeds():
    results = {"zero-shot": [Trial(MATRIX)], "lora": [trial(0, 80, 70, 60, 50), trial(1, 80, 70, 60, 60)]}
    assert watched_header(results)[:4] == ["run", "pope before", "pope after", "pope change"]
    assert watched_rows(results) == [["lora", "80.0", "55.0 ± 7.1", "-25.0 ± 7.1", "50.0", "50.0", "0.0"]]
    header, rows = stage_table(results["lora"])
    assert header == ["after", "pope (watched)", "faq (watched)"]
    assert [row[0] for row in rows] == ["zero-shot", *TASKS] and rows[2][1] == "60.0"
    assert stage_table(results["zero-shot"]) == ([], []) and watched_header({"x": [Trial(MATRIX)]}) == []


def test_every_form_of_the_report_has_them_apart_from_the_tasks(tmp_path):
    paths = write_report(tmp_path, "Run", {"lora": [trial(0, 80, 70, 60, 50.25)]})
    cells = list(csv.DictReader(open(paths["watched"])))
    assert len(cells) == 8 and cells[6] == {
        "run": "lora", "seed": "0", "after": "c", "task": "pope", "score": "50.25"
    }  # fmt: skip
    assert {row["task"] for row in csv.DictReader(open(paths["scores"]))} == set(TASKS)
    record = json.loads(paths["json"].read_text())["watched"]["lora"]
    assert record["change"] == {"pope": -29.75, "faq": 0.0}
    assert record["trials"][0]["scores"]["b"]["pope"] == 60
    for key, row in (
        ("table", "| lora | 80.0 | 50.2 | -29.8 |"),
        ("latex", r"lora & 80.0 & 50.2 & $-$29.8 &"),
    ):
        text = paths[key].read_text()
        assert row in text and "pope (watched)" in text and "pope" not in text.split("eneral ability")[0]
    page = paths["html"].read_text()
    assert "pope before" in page.split("General ability")[1]


def test_a_report_without_a_guard_has_none_of_it(tmp_path):
    paths = write_report(tmp_path, "Run", {"lora": [Trial(MATRIX)]})
    assert "watched" not in paths and not (tmp_path / "watched.csv").exists()
    assert "watched" not in paths["html"].read_text() and "watched" not in paths["json"].read_text()


@pytest.mark.parametrize("names", [("pope",), ("faq", "pope")])
def test_recipes_that_a_seed_lacks_have_no_column(names):
    other = Trial(MATRIX, seed=1, watched={"zero-shot": dict.fromkeys(names, 1.0)})
    header, rows = stage_table([trial(0, 80, 70), other])
    assert header == ["after", *(f"{n} (watched)" for n in ("pope", "faq") if n in names)] and len(rows) == 1
