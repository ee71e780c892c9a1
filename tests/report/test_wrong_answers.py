"""Wrong answers by class in the report: every task and stage, and means over seeds."""

from llava_keeplora.files import write_json
from llava_keeplora.report.results import Trial
from llava_keeplora.report.run_report import read_scores
from llava_keeplora.report.tables import markdown_tables
from llava_keeplora.report.wrong_answers import answer_records, confusion_rows, error_counts, error_rows
from llava_keeplora_eval import Matrix


def trial(seed, counted, plain):
    """A run of two tasks: `counted` and `plain` have the errors of each stage."""
    scores = [
        {
            "count": {"n": 8, "errors": one},
            "names": {"n": 4, "errors": two, "confusions": [["cat", "dog", 1]]},
        }
        for one, two in zip(counted, plain, strict=True)
    ]
    return Trial(Matrix(["count", "names"], None, []), seed=seed, scores=scores)


FIRST = trial(0, [{"empty": 1, "other": 7}, {"off by one": 3, "format": 1}, {"other": 2}], [{"other": 2}] * 3)
SECOND = trial(1, [{"other": 8}, {"off by one": 2}, {}], [{"other": 4}] * 3)


def test_a_task_has_a_row_for_each_stage_and_tasks_whose_classes_say_nothing_have_none():
    assert error_rows([FIRST]) == [
        ["count", "zero-shot", "8", "8", "1", "0", "0", "0", "7"],
        ["count", "count", "8", "4", "0", "1", "3", "0", "0"],
        ["count", "names", "8", "2", "0", "0", "0", "0", "2"],
    ]
    assert error_rows([SECOND])[1] == ["count", "count", "8", "2", "0", "0", "2", "0", "0"]


def test_several_seeds_have_means_and_the_columns_add_up():
    rows = error_rows([FIRST, SECOND])
    assert rows[1] == ["count", "count", "8", "3.0", "0.0", "0.5", "2.5", "0.0", "0.0"]
    assert all(float(row[3]) == sum(map(float, row[4:])) for row in rows)


def test_confusions_are_those_at_the_end_of_one_run():
    noise = {"names": {"n": 4, "errors": {"other": 4}, "confusions": [["cat", "\x10", 4]]}}
    assert confusion_rows([Trial(Matrix(["names"], None, []), scores=[noise])]) == [
        ["names", "cat → \\x10 (4)"]
    ]
    assert confusion_rows([FIRST]) == [["names", "cat → dog (1)"]] and confusion_rows([FIRST, SECOND]) == []


def test_a_stage_keeps_its_name_beside_a_task_that_was_rolled_back(tmp_path):
    for number, name in enumerate(["base", "a", "c"]):
        score = {"n": number, "score": 1.0, "metric": "accuracy", "metric_version": 1, "dropped": 0}
        write_json(tmp_path / f"task-0{number}-{name}/scores.json", {"a": score})
    places = {"a": tmp_path / "task-01-a", "b": tmp_path / "aside", "c": tmp_path / "task-02-c"}
    sizes = [scores["a"]["n"] for scores in read_scores(tmp_path, places, ["b"])]
    assert sizes == [0, 1, 1, 2], "the base, after a, after b, which is gone, and after c"
    assert len(read_scores(tmp_path, places | {"d": tmp_path / "task-03-d"}, ["b"])) == 4
    assert read_scores(tmp_path / "none", {"a": tmp_path / "none"}, []) == []


def test_a_record_has_every_stage_and_a_run_of_an_earlier_version_none():
    old = Trial(Matrix(["count"], None, []), scores=[{"count": {"n": 8, "score": 0.0}}])
    assert error_counts(old) == {} and error_rows([old]) == [] and confusion_rows([old]) == []
    (first, second) = answer_records({"m": [FIRST, SECOND]})["m"]
    assert second["seed"] == 1 and first["errors"]["count"]["count"] == {"off by one": 3, "format": 1}
    assert first["confusions"] == {
        "count": {},
        "names": {stage: [["cat", "dog", 1]] for stage in ("zero-shot", "count", "names")},
    }


def test_the_classes_are_beside_the_scores_in_the_run_s_table():
    whole = {
        "metric": "m",
        "metric_version": 1,
        "score": 50.0,
        "lenient": 60.0,
        "compliance": 90.0,
        "dropped": 0,
    }
    scores = [{task: whole | score for task, score in stage.items()} for stage in FIRST.scores]
    run = Trial(Matrix(["count", "names"], [1.0, 2.0], [[3.0, 4.0], [5.0, 6.0]]), seed=0, scores=scores)
    page = markdown_tables("t", {"a": [run]})
    assert "| task | after | n | wrong | empty | format | off by one | near | other |" in page
    assert "| count | count | 8 | 4 | 0 | 1 | 3 | 0 | 0 |" in page
