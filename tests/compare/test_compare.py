"""Methods × seeds × orders as runs: what is tuned, what is shared, what goes on, what the table says."""

import csv
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest

from llava_keeplora.compare import compare, write_table
from llava_keeplora.errors import RunError
from llava_keeplora_eval import Matrix


def folders(jobs, table):
    return [str(job.folder.relative_to(table.output_dir)) for job in jobs]


def test_every_setting_is_tried_on_held_out_training_data_and_then_every_seed_of_every_order_runs(
    tuned, tiny_tasks
):
    assert folders(tuned.started, tuned.table) == [
        "tuning/seq-lora-1",
        "tuning/seq-lora-2",
        "tuning/keeplora-1",
        "tuning/keeplora-2",
        "I/seed-0/seq-lora",
        "I/seed-0/keeplora",
        "I/seed-1/seq-lora",
        "I/seed-1/keeplora",
        "II/seed-0/seq-lora",
        "II/seed-0/keeplora",
    ]
    for job in tuned.started:
        config = json.loads((job.folder / "config.json").read_text())
        trial = job.folder.parent.name == "tuning"
        scored = json.loads((job.folder / "zero-shot/task-00-base/scores.json").read_text())
        assert config["data"]["holdout"] == (0.5 if trial else 0.0) and config["seed"] == (
            5 if trial else int(job.folder.parent.name[-1])
        )
        assert {one["n"] for one in scored.values()} == ({12} if trial else {8}), (
            "half of the 24 for training, or the whole test split"
        )


def test_a_methods_best_setting_on_the_held_out_part_is_the_one_that_runs(tuned, tuning):
    for label, settings in tuning["settings"].items():
        matrices = [
            Matrix.from_json(tuned.table.output_dir / f"tuning/{label}-{i}" / label / "matrix.json").rows
            for i in (1, 2)
        ]
        # Transfer of two tasks is one cell, Last the mean of the last row.
        sums = [rows[0][1] + statistics.mean(rows[1]) for rows in matrices]
        best = settings[sums.index(max(sums))]
        assert [one.chosen for one in tuned.outcome.tried if one.label == label] == [
            one is best for one in settings
        ]
        for job in tuned.started[4:]:
            if job.label == label:
                method = json.loads((job.folder / "config.json").read_text())["methods"][label]
                assert method["training"]["learning_rate"] == best.get("training", {}).get(
                    "learning_rate", 0.01
                )
                assert method["options"].get("form") == best.get("form")
                assert (
                    method["parts"]["vision"]["rank"]
                    == best.get("parts", {}).get("vision", {}).get("rank", 2)
                    and method["parts"]["text"]["rank"] == 2
                )


def test_what_is_known_of_the_untouched_model_is_computed_once(tuned):
    def taken(job, label, stage):
        entries = [
            json.loads(line) for line in (job.folder / label / "journal.jsonl").read_text().splitlines()
        ]
        return [
            "taken_seconds" in entry["info"]
            for entry in entries
            if (entry["task"], entry["stage"]) == (0, stage)
        ]

    answers = [taken(job, "zero-shot", "EVALUATED") for job in tuned.started]
    # Once on the held-out part, once on the test split.
    assert answers == [[False], *[[True]] * 3, [False], *[[True]] * 5]
    bases = {
        str(job.folder.relative_to(tuned.table.output_dir)): taken(job, "keeplora", "CONSOLIDATED")
        for job in tuned.started
        if job.label == "keeplora"
    }
    assert bases["I/seed-1/keeplora"] == bases["II/seed-0/keeplora"] == [True]
    assert bases["tuning/keeplora-1"] == bases["tuning/keeplora-2"] == [False], (
        "other options are another base"
    )


def test_a_finished_table_starts_nothing_and_a_new_seed_starts_its_runs_alone(
    tuned, make_table, orders, tuning, started, tmp_path
):
    copy = shutil.copytree(tuned.table.output_dir, tmp_path / "table")
    assert (
        compare(make_table(copy, orders=orders, tuning=tuning)).results.keys() == {"I", "II"}
        and started == []
    )
    more = make_table(copy, orders={"I": orders["I"], "II": {**orders["II"], "seeds": [0, 3]}}, tuning=tuning)
    outcome = compare(more)
    assert (
        folders(started, more) == ["II/seed-3/seq-lora", "II/seed-3/keeplora"]
        and len(outcome.results["II"]["keeplora"]) == 2
    )


@pytest.mark.slow
def test_a_finished_run_whose_numbers_were_changed_makes_them_again_and_one_that_was_damaged_is_named(
    tuned, make_table, orders, tuning, started, tmp_path
):
    copy = shutil.copytree(tuned.table.output_dir, tmp_path / "table")
    matrix, right = (
        copy / "I/seed-0/keeplora/keeplora/matrix.json",
        (tuned.table.output_dir / "I/seed-0/keeplora/keeplora/matrix.json").read_text(),
    )
    for wrong in (right.replace(".0", ".1"), None):
        matrix.write_text(wrong) if wrong else matrix.unlink()
        compare(make_table(copy, orders=orders, tuning=tuning))
        assert matrix.read_text() == right and [job.folder.relative_to(copy) for job in started] == [
            Path("I/seed-0/keeplora")
        ]
        del started[:]
    scores = next((copy / "II/seed-0/seq-lora").glob("seq-lora/task-02*/scores.json"))
    scores.write_text("{")
    with pytest.raises(RunError, match=f"{scores} is not what stage EVALUATED of task 2 wrote"):
        compare(make_table(copy, orders=orders, tuning=tuning))


def test_the_table_says_mean_and_deviation_needs_and_what_was_tried(tuned, started):
    text = write_table(tuned.table, tuned.outcome)
    out = tuned.table.output_dir
    assert text == (out / "table.md").read_text() and {"table.tex", "table.csv", "report.html"} <= {
        path.name for path in out.iterdir()
    }
    first, second, settings, learning = re.split(r"^## ", text, flags=re.M)[1:]
    assert learning.startswith("What learning costs") and "| keeplora |" in learning
    assert first.startswith("Order I\n\nTasks: colours, stripes. ") and second.startswith(
        "Order II\n\nTasks: stripes, colours. "
    )
    averages = [
        Matrix.from_json(out / f"I/seed-{seed}/keeplora/keeplora/matrix.json").metrics()["average"]
        for seed in (0, 1)
    ]
    row = next(line for line in first.splitlines() if line.startswith("| keeplora |")).split(" | ")
    assert row[1] == "2" and row[3] == f"{statistics.mean(averages):.1f}" + (
        f" ± {statistics.stdev(averages):.1f}" if len(set(averages)) > 1 else ""
    )
    assert first.splitlines()[4].endswith(
        "| trained per task | kept per task (kB) | extra time per image at test (ms) "
        "| examples trained on | training passes per task | other passes per task | needs |"
    )
    assert len(row) == 14 and re.fullmatch(r"\d+", row[7]) and "n/a" not in row[9]
    assert row[10:] == ["48", "1.00", "2.00", "nothing |"]
    assert (
        "Settings tried for each method: 2, on order I with seed 5, scored on 50 % of the training data"
        in settings
    )
    assert (
        "Chosen: the largest transfer + last." in settings
        and settings.count("| yes |") == 2
        and settings.count("\n| keeplora: ") == 2
    )
    assert (
        "| keeplora: form=literal |" in settings and "| seq-lora: training.learning_rate=1e-09 |" in settings
    )
    tried = json.loads((out / "tried.json").read_text())
    assert [(one["label"], one["chosen"]) for one in tried] == [
        (one.label, one.chosen) for one in tuned.outcome.tried
    ] and tried[0]["metrics"] == tuned.outcome.tried[0].metrics
    rows = list(csv.DictReader(open(out / "table.csv")))
    assert [(one["order"], one["run"], one["n"]) for one in rows] == [
        ("I", "zero-shot", "1"),
        ("I", "seq-lora", "2"),
        ("I", "keeplora", "2"),
        ("II", "zero-shot", "1"),
        ("II", "seq-lora", "1"),
        ("II", "keeplora", "1"),
    ]
    assert float(rows[2]["average_mean"]) == statistics.mean(averages)
    assert (out / "table.tex").read_text().count(r"\begin{tabular}") == 4
    page = (out / "report.html").read_text()
    assert page.count("<table>") == 4 and 'href="II/report.html"' in page


@pytest.mark.slow
def test_of_some_methods_only_theirs_are_run_and_the_table_keeps_what_the_others_have(
    tuned, make_table, orders, tuning, started, tmp_path
):
    copy = shutil.copytree(tuned.table.output_dir, tmp_path / "table")
    more = make_table(copy, orders={"I": orders["I"], "II": {**orders["II"], "seeds": [0, 3]}}, tuning=tuning)
    outcome = compare(more, labels=["keeplora"])
    assert folders(started, more) == ["II/seed-3/keeplora"]
    second = next(one for one in write_table(more, outcome).split("## ") if one.startswith("Order II"))
    assert (
        " seeds 0, 3. Not finished: seq-lora with seed 3.\n" in second
        and "| seq-lora | 1 |" in second
        and "| keeplora | 2 |" in second
    )
    # A method that is not run may lack what it needs.
    other = make_table(tmp_path / "other", methods={"seq-lora": {}, "zscl": {"reference": "gone"}})
    assert compare(other, labels=["seq-lora"]).results["I"].keys() == {"zero-shot", "seq-lora"}


@pytest.mark.slow
def test_settings_of_bounds_are_chosen_by_last_their_only_number(make_table, tmp_path, started):
    rates = [{"training": {"learning_rate": rate}} for rate in (1e-9, 0.02)]
    bounds = {"individual": {}, "joint": {}}
    tuning = {"holdout": 0.5, "settings": dict.fromkeys(["seq-lora", *bounds], rates)}
    table = make_table(tmp_path / "table", methods={"seq-lora": {}, **bounds}, tuning=tuning)
    outcome = compare(table)
    for label in bounds:
        tried = [one for one in outcome.tried if one.label == label]
        lasts = [one.metrics["last"] for one in tried]
        assert [one.chosen for one in tried] == [number == lasts.index(max(lasts)) for number in (0, 1)]
        assert outcome.results["I"].keys() >= {label}
    text = write_table(table, outcome)
    assert "Chosen: the largest average; of bounds, the largest last." in text and "| n/a | n/a |" in text


@pytest.mark.slow
def test_a_setting_whose_run_a_guard_stopped_is_chosen_only_if_no_setting_came_further(
    make_table, tmp_path, started, monkeypatch, caplog
):
    rates = [{"training": {"learning_rate": rate}} for rate in (0.02, 0.01)]
    tuning = {"holdout": 0.5, "settings": {"seq-lora": rates}}
    table = make_table(tmp_path / "table", methods={"seq-lora": {}}, tuning=tuning)
    compare(table)
    whole = Matrix.from_json
    stopped = ["seq-lora-1"]

    def short(path):
        matrix = whole(path)
        if Path(path).parts[-3] in stopped:
            return Matrix(matrix.tasks, matrix.zero_shot, matrix.rows[:1])
        return matrix

    monkeypatch.setattr("llava_keeplora.compare.run_table.Matrix.from_json", short)
    assert [one.chosen for one in compare(table).tried] == [False, True]
    stopped.append("seq-lora-2")
    with caplog.at_level("WARNING"):
        assert [one.chosen for one in compare(table).tried] == [False, False]
    assert "no setting of 'seq-lora' has a complete average" in caplog.text


def test_a_table_that_only_tries_settings_says_what_they_gave(make_table, tmp_path, started, tiny_tasks):
    tasks = {"small": {"tasks": [str(path) for path in tiny_tasks[:2]], "seeds": []}}
    settings = {"seq-lora": [{}, {"training": {"learning_rate": 0.02}}], "individual": [], "joint": []}
    tuning, methods = {"metric": "last", "settings": settings}, dict.fromkeys(settings, {})
    table = make_table(tmp_path / "table", orders=tasks, methods=methods, tuning=tuning)
    outcome = compare(table)
    text = write_table(table, outcome)
    assert (
        outcome.results == {}
        and text.count("## ") == 2
        and text.count("| yes |") == 1
        and "| seq-lora: training.learning_rate=0.02 |" in text
        and "Settings tried for each method but individual, joint: 2, on order small" in text
    )


def test_a_run_that_fails_is_named_and_the_others_go_on(make_table, tmp_path, started):
    # No direction is left beside all of the weights' energy: KeepLoRA refuses, before it learns.
    table = make_table(
        tmp_path / "table",
        methods={"keeplora": {"parts": {"vision": {"energy_weight": 1.0}}}, "seq-lora": {}},
        seeds=[0, 1],
    )
    outcome = compare(table)
    assert [failure.job.folder.relative_to(table.output_dir).as_posix() for failure in outcome.failures] == [
        "I/seed-0/keeplora",
        "I/seed-1/keeplora",
    ]
    told = str(outcome.failures[0])
    assert re.fullmatch(
        rf"{table.output_dir}/I/seed-0/keeplora failed \(layer .* input directions outside .*\), see {table.output_dir}/I/seed-0/keeplora.log",
        told,
    )
    assert {name: len(trials) for name, trials in outcome.results["I"].items()} == {
        "zero-shot": 1,
        "seq-lora": 2,
    }
    assert " seeds 0, 1. Not finished: keeplora with seeds 0, 1.\n" in write_table(table, outcome)


def test_a_method_with_an_open_setting_waits_for_it(make_table, tmp_path, started):
    settings = {"seq-lora": [{}], "keeplora": [{"parts": {"vision": {"energy_weight": 1.0}}}]}
    outcome = compare(make_table(tmp_path / "table", tuning={"metric": "last", "settings": settings}))
    assert [failure.job.folder.name for failure in outcome.failures] == ["keeplora-1"]
    assert outcome.results["I"].keys() == {"zero-shot", "seq-lora"} and outcome.settings == {"seq-lora": {}}
    (section,) = [
        part
        for part in write_table(make_table(tmp_path / "table", tuning={"settings": settings}), outcome).split(
            "## "
        )
        if part.startswith("Settings")
    ]
    assert "| keeplora: not chosen yet |" in section
