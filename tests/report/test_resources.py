"""Examples, passes and needs of methods, from journals written by hand."""

import json

import pytest

from llava_keeplora.report.resources import budget_factors, needs_numbers, needs_rows, read_needs
from llava_keeplora.report.results import Trial
from llava_keeplora.report.run_report import read_costs
from llava_keeplora_eval import Matrix


def write_journal(
    folder, trained, *, passes=(), plan=(), task_id=False, closed=True, learned=None, further=0
):
    """Write the journal of two tasks of 10 and 30 examples.

    Args:
        trained: per task, source → examples seen.
        passes: (task, stage) → kind → examples.
        plan: keys that the plan has.
        task_id: whether the task is needed at test.
        closed: whether the last task is.
        learned: what there is to learn of each task, where it isn't an example each.
        further: how many of a task's examples its loss asked for besides the steps' own batches.
    """
    sizes = [{"task": f"t{n}", "train": {"n": n}} for n in (10, 30)]
    entries = [(0, "PLANNED", {"tasks": sizes} | {key: {"images": 1} for key in plan})]
    for task, examples in enumerate(trained, start=1):
        (folder / f"task-0{task}-t").mkdir(parents=True)
        (folder / f"task-0{task}-t/delta.safetensors").write_bytes(b"x" * 1000)
        info = {"steps": 5, "trained_parameters": 7} | ({} if examples is None else {"examples": examples})
        info |= {"training_examples": learned[task - 1]} if learned else {}
        info |= {"further_examples": further} if further else {}
        entries += [(task, "PREPARED", {}), (task, "TRAINED", info), (task, "CONSOLIDATED", {})]
        times = {"test_seconds": {"untouched": 1.0, "learned": 1.5}} if task == len(trained) else {}
        if closed or task < len(trained):
            entries.append((task, "CLOSED", {"task_id_at_test": task_id} | times))
    with open(folder / "journal.jsonl", "w") as file:
        for task, stage, info in entries:
            files = {f"task-0{task}-t/delta.safetensors": "0"} if stage == "TRAINED" else {}
            info = info | ({"passes": dict(passes)[task, stage]} if (task, stage) in dict(passes) else {})
            entry = {"task": task, "stage": stage, "seconds": 1.0, "files": files, "info": info}
            file.write(json.dumps(entry) + "\n")
    return read_needs(folder)


def test_passes_are_counted_per_training_example_of_the_tasks(tmp_path):
    passes = [
        ((1, "PREPARED"), {"gradient": 5}),
        ((2, "PREPARED"), {"gradient": 15}),
        ((2, "TRAINED"), {"forward": 60}),
        ((2, "CONSOLIDATED"), {"feature": 30, "forward": 20}),
    ]
    needs = write_journal(tmp_path, [{"1": 20}, {"1": 30, "2": 60}], passes=passes)
    # 110 examples of training on 40 of data; 20 gradients, 30 features and 80 other forward passes.
    assert needs.examples == 110 and needs.training_passes == 110 / 40
    assert needs.other_passes == {"feature": 30 / 40, "forward": 80 / 40, "gradient": 20 / 40}
    assert needs.inputs == ("old examples",)
    row = needs_rows({"m": [Trial(Matrix(["a"], None, []), needs=needs)]})[0]
    assert row == ["m", "7", "1.0", "500.00", "110", "2.75", "3.25", "old examples"]


def test_what_was_rolled_back_was_trained_on_and_nothing_of_it_is_kept(tmp_path):
    whole = write_journal(tmp_path, [{"1": 10}, {"2": 30}])
    record = {"task": "t30", "folder": "task-02-t", "aside": "rolled-back/task-02-t"}
    with open(tmp_path / "journal.jsonl", "a") as file:
        entry = {"task": 2, "stage": "ROLLED_BACK", "info": {"rolled_back": record}}
        file.write(json.dumps(entry) + "\n")
    needs = read_needs(tmp_path)
    assert (needs.examples, needs.training_passes) == (whole.examples, 1.0) == (40, 1.0)
    assert whole.kept_bytes == needs.kept_bytes == 1000, "over one task instead of two"
    assert read_costs(tmp_path)["TRAINED"].seconds == 2.0


@pytest.mark.parametrize(
    ("settings", "inputs"),
    [
        ({"trained": [{"1": 10}, {"2": 30}]}, ()),
        ({"trained": [{"1": 10}, {"2": 30}], "task_id": True}, ("task at test",)),
        ({"trained": [{}, {"1": 10, "2": 30}]}, ("old examples",)),
        ({"trained": [{"1": 10}, {"2": 30}], "plan": ("reference",)}, ("reference data",)),
        ({"trained": [{"0": 4, "1": 10}, {"0": 4, "2": 30}], "plan": ("general",)}, ("general data",)),
        ({"trained": [{"1": 10}, {"2": 30}], "closed": False}, None),
    ],
)
def test_what_a_method_needs_is_read_from_what_it_did(settings, inputs, tmp_path):
    assert write_journal(tmp_path, **settings).inputs == inputs


def test_passes_are_over_what_there_is_to_learn_where_images_have_several_captions(tmp_path):
    needs = write_journal(tmp_path, [{"1": 40}, {"2": 60}], learned=[20, 30])
    assert (needs.examples, needs.training_passes) == (100, 2.0)


def test_of_a_run_that_did_not_record_examples_nothing_is_said(tmp_path):
    needs = write_journal(tmp_path, [None, None])
    assert (needs.examples, needs.training_passes, needs.other_passes) == (None, None, None)
    assert needs.trained == 7 and needs_rows({"m": [Trial(Matrix(["a"], None, []), needs=needs)]})[0][4] == (
        "n/a"
    )


def test_a_row_with_another_number_of_examples_than_most_has_its_factor(tmp_path):
    def trial(name, count, **settings):
        needs = write_journal(tmp_path / name, [{"1": count // 4}, {"2": count - count // 4}], **settings)
        return Trial(Matrix(["a"], None, []), needs=needs)

    results = {
        "first": [trial("first", 160)],
        "a": [trial("a", 40)],
        "b": [trial("b0", 40), trial("b1", 40)],
        "open": [trial("open", 20, closed=False)],
    }
    assert budget_factors(results) == {"first": 4.0}
    cells = {row[0]: row[4] for row in needs_rows(results)}
    assert cells == {"first": "160 (4.00 ×)", "a": "40", "b": "40", "open": "20"}
    assert needs_numbers(results)["b"] == [7, 1000, 0.5, 40, 1.0, 0, ""]
    assert budget_factors({name: results[name] for name in ("a", "b")}) == {}
    # A replay is the row that differs, wherever it stands.
    replayed = write_journal(tmp_path / "replay", [{"1": 20}, {"1": 20, "2": 20}])
    replay = [Trial(Matrix(["a"], None, []), needs=replayed)]
    assert budget_factors({"replay": replay, "a": results["a"]}) == {"replay": 1.5}
    # So is a method whose loss trains on more than the steps' own batches.
    distilled = write_journal(tmp_path / "distilled", [{"1": 20}, {"2": 60}], further=10)
    distilling = [Trial(Matrix(["a"], None, []), needs=distilled)]
    assert budget_factors({"distilling": distilling, "a": results["a"]}) == {"distilling": 2.0}
