"""How many more tasks find room: in a run's files, in its log, and in its summary."""

import json
import logging

import pytest
from torch import nn

from llava_keeplora.methods import Layer
from llava_keeplora.report.run_report import read_results, room_line
from llava_keeplora.report.terminal import summary, trials_of_run
from llava_keeplora.sequence.forecast import shortage
from llava_keeplora.subspace import Room


def consolidated(run, method="keeplora"):
    return [json.loads(path.read_text()) for path in sorted((run / method).glob("task-*/consolidated.json"))]


def test_every_task_leaves_a_forecast_of_each_layer_from_the_sizes_so_far(three_tasks_run):
    base, *tasks = consolidated(three_tasks_run)
    assert "forecast" not in base
    for count, report in enumerate(tasks, start=1):
        assert set(report["forecast"]) == set(base["capacity"])
        for name, room in report["forecast"].items():
            k, start = report["capacity"][name]["k"], base["capacity"][name]["k"]
            assert room["left"] == 32 - k and room["growth"] == pytest.approx((k - start) / count)
            if room["tasks"]:
                last = k + (room["tasks"] - 1) * room["growth"]
                assert 32 - last >= 2 > 32 - last - room["growth"]


def test_the_summary_of_a_run_names_the_layer_that_fills_first(three_tasks_run):
    last = consolidated(three_tasks_run)[-1]
    fewest = min(room["tasks"] for room in last["forecast"].values() if room["tasks"] is not None)
    results = trials_of_run(three_tasks_run, read_results(three_tasks_run))
    (line,) = [line for line in summary(three_tasks_run, results).splitlines() if line.startswith("room of ")]
    assert line.startswith(f"room of keeplora: {fewest} more task")
    (named,) = [name for name in last["forecast"] if f"the first layer to fill is {name}, " in line]
    assert last["forecast"][named]["tasks"] == fewest
    assert room_line("seq-lora", three_tasks_run / "seq-lora") is None


def test_tasks_to_come_without_room_are_warned_of_in_a_sentence_with_its_cure():
    layers = {f"v.{i}": Layer(f"v.{i}", "vision", nn.Linear(64, 64), 16, 16.0, 0.5, 0.9) for i in range(3)}
    rooms = {"v.0": Room(30, 8.0, 2), "v.1": Room(20, 9.5, 1), "v.2": Room(64, 0.0, None)}
    assert shortage(rooms, layers, 1) is None
    warning = shortage(rooms, layers, 3)
    for fact in (
        "3 more tasks to come, and 2 of 3 layers have no room",
        "the first to fill up is v.1: 20 of 64 directions are left, 9.5 fewer after each task",
        "room for 1 at rank 16",
        "a lower parts.vision.energy_feature or parts.vision.rank",
    ):
        assert fact in warning


def test_a_run_warns_while_tasks_are_to_come_and_says_nothing_after_the_last(
    run_config, drive, tmp_path, tiny_tasks, caplog
):
    part = {"energy_weight": 0.5, "energy_feature": 0.999, "rank": 8, "alpha": 8}
    with caplog.at_level(logging.WARNING):
        drive(
            run_config(
                tmp_path / "run",
                methods={"keeplora": {}},
                parts={"vision": part, "text": part},
                tasks=[str(path) for path in tiny_tasks[:2]],
            )
        )
    (told,) = [message for message in caplog.messages if "to come" in message]
    assert told.startswith("keeplora: 1 more task to come, and ")
