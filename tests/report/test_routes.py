"""The table of what answered: shares of each task's test examples, where answers were routed."""

from llava_keeplora.report.results import Trial
from llava_keeplora.report.routes import route_table
from llava_keeplora.report.tables import markdown_tables
from llava_keeplora_eval import Matrix


def routed(n, base, **tasks):
    return {
        "score": 50.0,
        "n": n,
        "dropped": 0,
        "metric": "accuracy",
        "metric_version": 1,
        "lenient": None,
        "compliance": None,
        "routes": {"tasks": tasks, "base": base},
    }


def trial(*stages, tasks=("birds", "digits"), **more):
    rows = [[50.0] * len(tasks) for _ in stages[1:]]
    return Trial(Matrix(list(tasks), [50.0] * len(tasks), rows), scores=stages, **more)


def test_shares_are_of_the_last_stage_and_means_over_seeds():
    first = {"birds": routed(4, 0, birds=4), "digits": routed(10, 10)}
    one = trial({}, first, {"birds": routed(4, 1, birds=3), "digits": routed(10, 0, birds=2, digits=8)})
    two = trial({}, first, {"birds": routed(4, 0, birds=4), "digits": routed(10, 5, digits=5)})
    header, rows = route_table([one])
    assert header == ["routed to, % at the end", "birds", "digits", "base"]
    assert rows == [["birds", "75.0", "0.0", "25.0"], ["digits", "20.0", "80.0", "0.0"]]
    assert route_table([one, two])[1] == [
        ["birds", "87.5", "0.0", "12.5"],
        ["digits", "10.0", "65.0", "25.0"],
    ]
    assert "| digits | 20.0 | 80.0 | 0.0 |" in markdown_tables("run", {"task-lora": [one]})


def test_tasks_to_come_and_those_taken_back_have_no_column():
    stages = {}, {"birds": routed(4, 4), "digits": routed(2, 2), "shapes": routed(2, 1, birds=1)}
    unfinished = trial(*stages, tasks=("birds", "digits", "shapes"))
    assert route_table([unfinished])[0] == ["routed to, % at the end", "birds", "base"]
    back = trial(*stages, stages[1], tasks=("birds", "digits", "shapes"), rolled_back=["digits"])
    assert route_table([back])[0] == ["routed to, % at the end", "birds", "base"]


def test_a_method_that_routes_nothing_has_no_table():
    plain = {key: value for key, value in routed(4, 0).items() if key != "routes"}
    learned = trial({}, {"birds": plain, "digits": plain})
    assert route_table([learned])[1] == [] and "routed" not in markdown_tables("run", {"x": [learned]})
    assert route_table([trial()])[1] == []
