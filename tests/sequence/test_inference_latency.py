"""What a method costs at test is measured beside the untouched model, on one batch in one process."""

import json
import time

import pytest
import torch

from llava_keeplora.config import parse_config
from llava_keeplora.methods import METHODS
from llava_keeplora.report.resources import read_needs
from llava_keeplora.sequence import inference_latency
from llava_keeplora.sequence.inference_latency import seconds_per_example
from llava_keeplora.sequence.method_run import MethodRun

PAUSE = 0.02


class Slow:
    """Answers after a pause; the first time after a long one."""

    def __init__(self, predictor=None):
        self.own, self.batches = predictor, []

    def predict(self, examples):
        self.batches.append(len(examples))
        time.sleep(PAUSE * (1 if len(self.batches) > 1 else 20))
        return self.own.predict(examples) if self.own else [""] * len(examples)


def test_what_an_example_takes_leaves_the_first_answer_out(monkeypatch):
    monkeypatch.setattr(inference_latency, "REPEATS", 5)
    slow = Slow()
    assert PAUSE <= 4 * seconds_per_example(slow, [None] * 4) < 10 * PAUSE
    assert slow.batches == [4] * (1 + inference_latency.REPEATS)


def closed(folder):
    return [
        entry["info"]
        for entry in map(json.loads, (folder / "journal.jsonl").open())
        if entry["stage"] == "CLOSED"
    ]


@pytest.fixture
def slow_method(monkeypatch):
    monkeypatch.setattr(inference_latency, "REPEATS", 5)  # Other tests' runs measure once, and noise shows.
    monkeypatch.setattr(METHODS["seq-lora"], "predictor", lambda self, predictor, task: Slow(predictor))


def test_what_a_method_adds_at_test_is_in_the_last_closed_task_and_in_the_table(
    run_config, drive, tmp_path, one_label, tiny_tasks, slow_method
):
    drive(run_config(tmp_path / "run", tasks=[str(path) for path in tiny_tasks[:2]], **one_label("seq-lora")))
    *before, last = closed(tmp_path / "run/seq-lora")
    assert not any("test_seconds" in info for info in [*before, *closed(tmp_path / "run/zero-shot")])
    extra = last["test_seconds"]["learned"] - last["test_seconds"]["untouched"]
    size = len((tmp_path / "run/seq-lora/task-02-stripes/predictions/stripes.jsonl").read_text().splitlines())
    assert PAUSE / 2 < extra * min(size, inference_latency.EXAMPLES) < 20 * PAUSE
    assert read_needs(tmp_path / "run/seq-lora").test_seconds == pytest.approx(extra)


def test_no_more_examples_are_answered_at_once_than_an_evaluation_does(
    run_config, drive, tmp_path, one_label, tiny_tasks, monkeypatch
):
    sizes = []
    monkeypatch.setattr(
        "llava_keeplora.sequence.stages.seconds_per_example",
        lambda predictor, examples: sizes.append(len(examples)) or 1.0,
    )
    drive(
        run_config(
            tmp_path / "run",
            tasks=[str(tiny_tasks[0])],
            evaluation={"batch_size": 3},
            **one_label("seq-lora"),
        )
    )
    assert sizes == [3, 3]


def test_the_untouched_models_time_is_that_of_the_bases_weights_and_the_learned_ones_are_back_afterwards(
    run_config, drive, tmp_path, one_label, tiny_tasks, monkeypatch
):
    carried = []

    def watched(predictor, examples):
        carried.append({name: p.detach().clone() for name, p in predictor.model.named_parameters()})
        return 1.0

    monkeypatch.setattr("llava_keeplora.sequence.stages.seconds_per_example", watched)
    runs, real = [], MethodRun.go
    monkeypatch.setattr(MethodRun, "go", lambda self: (runs.append(self), real(self)))
    drive(run_config(tmp_path / "run", tasks=[str(tiny_tasks[0])], **one_label("seq-lora")))
    run = runs[-1]
    untouched, learned = carried
    base = run.context.pretrained().state_dict()
    assert all(torch.equal(value, base[name]) for name, value in untouched.items())
    now = dict(run.context.family.model.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in learned.items()) and any(
        not torch.equal(learned[name], untouched[name]) for name in learned
    )
    assert read_needs(tmp_path / "run/seq-lora").test_seconds == 0.0


def test_answers_that_are_timed_have_one_length_whatever_was_learned(
    llava_tree, drive, tmp_path, mixed_tasks, monkeypatch
):
    written = []

    def watched(predictor, examples):
        with monkeypatch.context() as patch:
            generate = predictor.model.generate
            patch.setattr(
                predictor.model,
                "generate",
                lambda input_ids, **more: record(input_ids.shape[1], generate(input_ids=input_ids, **more)),
            )
            predictor.predict(examples)
        return 1.0

    def record(asked, ids):
        written.append(ids.shape[1] - asked)
        return ids

    monkeypatch.setattr("llava_keeplora.sequence.stages.seconds_per_example", watched)
    drive(parse_config(llava_tree(tmp_path / "run", tasks=[str(mixed_tasks[0])])))
    assert written == [inference_latency.TOKENS] * 2, "untouched and learned"
