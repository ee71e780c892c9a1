"""A LLaVA sequence of three kinds of tasks, the projector trained in full beside the adapters."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_keeplora.adapters import Delta, FullDelta, load_deltas
from llava_keeplora.config import parse_config
from llava_keeplora.sequence import trainer
from llava_keeplora_eval.errors import EvalError

TASKS = ["task-01-questions", "task-02-captions", "task-03-corners"]


@pytest.fixture(scope="module")
def run(llava_config, driven, tmp_path_factory) -> Path:
    return driven(llava_config(tmp_path_factory.mktemp("llava") / "run"))


def test_every_task_is_scored_after_each_one_with_its_own_metric(run):
    matrix = json.loads((run / "keeplora/matrix.json").read_text())
    assert matrix["tasks"] == ["questions", "captions", "corners"]
    assert [len(row) for row in matrix["rows"]] == [3, 3, 3] and all(
        0 <= cell <= 100 for row in matrix["rows"] for cell in row
    )
    scores = json.loads((run / "keeplora" / TASKS[2] / "scores.json").read_text())
    assert {name: score["metric"] for name, score in scores.items()} == {
        "questions": "exact_match",
        "captions": "caption_rouge_l",
        "corners": "accuracy",
    }


def test_a_trained_model_answers_what_it_was_taught(llava_config, drive, tmp_path, mixed_tasks):
    config = llava_config(
        tmp_path / "run",
        tasks=[str(mixed_tasks[0])],
        training={"num_train_epochs": 40},
        parts={"language": {"rank": 8, "alpha": 8}},
        methods={"seq-lora": {}},
        evaluation={"max_new_tokens": 12},
    )
    matrix = drive(config)["seq-lora"]
    assert matrix.zero_shot[0] == 0 and matrix.rows[0][0] >= 75


def test_all_captions_of_an_image_are_trained_on(run):
    train = json.loads((run / "keeplora" / TASKS[1] / "train.json").read_text())
    assert train["steps"] == 6, "24 images with two captions each, eight at a time"


def test_adapters_move_outside_the_protected_subspace_only(run):
    bases: dict[str, torch.Tensor] = {}
    for task in ("task-00-base", *TASKS):
        folder = run / "keeplora" / task
        if task != "task-00-base":
            deltas = {
                n: d for n, d in load_deltas(folder / "delta.safetensors").items() if isinstance(d, Delta)
            }
            assert deltas.keys() == bases.keys()
            for name, delta in deltas.items():
                assert float((delta.dense() @ bases[name]).norm()) <= 1e-5 * max(
                    1.0, float(delta.dense().norm())
                ), name
                torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(len(delta.A)), atol=1e-5, rtol=0)
        state = load_file(folder / "state.safetensors")
        bases = {
            name: torch.cat([bases[name], new], dim=1) if name in bases else new
            for name, new in state.items()
        }


def test_the_projector_changes_in_full_at_every_task(run):
    for task in TASKS:
        full = {
            n: d
            for n, d in load_deltas(run / "keeplora" / task / "delta.safetensors").items()
            if isinstance(d, FullDelta)
        }
        assert sorted(full) == [
            "model.multi_modal_projector.linear_1",
            "model.multi_modal_projector.linear_2",
        ]
        assert all(d.parameters["weight"].any() and d.parameters["bias"].any() for d in full.values())


def test_layers_past_the_feature_layer_are_counted_in_the_journal(run):
    entries = [json.loads(line) for line in (run / "keeplora/journal.jsonl").read_text().splitlines()]
    prepared = [e["info"] for e in entries if e["stage"] == "PREPARED"]
    assert [(info["layers"], info["unreachable"]) for info in prepared] == [(18, 4)] * 3
    report = json.loads((run / "keeplora" / TASKS[0] / "prepared.json").read_text())
    assert len(report["unreachable"]) == 4 and all(".layers.1." in name for name in report["unreachable"])


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_a_run_stopped_within_training_ends_with_the_same_files(
    llava_config, run_to_the_end, stop_within_training, tmp_path, run, left_behind, step
):
    stopped = stop_within_training(step)
    assert run_to_the_end(llava_config(tmp_path / "run")) == 4
    assert len(stopped) == 3
    assert left_behind(tmp_path / "run") == left_behind(run)


def test_each_part_trains_at_its_own_rate(llava_config, drive, monkeypatch, tmp_path, mixed_tasks):
    seen = []
    create = trainer.TaskTrainer.create_optimizer

    def spy(self, model=None):
        optimizer = create(self, model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        seen.append({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
        return optimizer

    monkeypatch.setattr(trainer.TaskTrainer, "create_optimizer", spy)
    drive(
        llava_config(tmp_path / "run", tasks=[str(mixed_tasks[0])], parts={"vision": {"learning_rate": 5e-4}})
    )
    (rates,) = seen
    expected = {"vision_tower": 5e-4, "multi_modal_projector": 1e-3, "language_model": 0.01}
    assert dict(rates.items()) == {
        name: next(rate for part, rate in expected.items() if part in name) for name in rates
    }
    assert len(rates) == 4 + 4 + 14, "B of each adapter, and weight and bias of the projector"


def test_a_part_that_is_not_named_stays_as_it_is(llava_config, drive, tmp_path, mixed_tasks):
    drive(
        llava_config(tmp_path / "run", tasks=[str(mixed_tasks[0])], parts={"vision": None, "connector": None})
    )
    deltas = load_deltas(tmp_path / "run/keeplora/task-01-questions/delta.safetensors")
    assert deltas and all(name.startswith("model.language_model.") for name in deltas)


@pytest.mark.slow
def test_recomputing_activations_trains_the_same(llava_config, drive, tmp_path, mixed_tasks):
    results = []
    for name in ("", "activation_checkpointing", "gradient_checkpointing"):
        settings = {name: True} if name else {}
        drive(llava_config(tmp_path / f"run{name}", tasks=[str(mixed_tasks[0])], training=settings))
        results.append(load_deltas(tmp_path / f"run{name}/keeplora/task-01-questions/delta.safetensors"))
    plain, *checkpointed = results
    for layer, delta in plain.items():
        for other in checkpointed:
            torch.testing.assert_close(delta.dense(), other[layer].dense(), atol=1e-5, rtol=1e-3)


def test_a_question_that_leaves_no_room_for_an_answer_is_named_before_any_weight_is_loaded(
    llava_config, drive, tmp_path, monkeypatch
):
    from llava_keeplora.models import LlavaFamily

    monkeypatch.setattr(LlavaFamily, "load", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(
        EvalError,
        match=r"record 'train-0-0' of questions \(questions-train.json\) has \d+ tokens, \d+ of them before the answer",
    ):
        drive(llava_config(tmp_path / "run", model={"max_length": 150}))


def test_a_clip_run_refuses_a_captioning_task(run_config, drive, tmp_path, mixed_tasks):
    with pytest.raises(EvalError, match="task 'captions' is captioning, and CLIP does classification only"):
        drive(run_config(tmp_path / "run", tasks=[str(mixed_tasks[1])]))


def test_the_configuration_of_a_llava_run_survives_a_round_trip(llava_tree, tmp_path):
    tree = llava_tree(tmp_path / "run")
    config = parse_config(copy.deepcopy(tree))
    assert config.parts["connector"].train == "full" and config.parts["connector"].learning_rate == 1e-3
    assert config.parts["vision"].targets is None


@pytest.mark.slow
def test_small_batches_accumulated_train_as_one_large_batch(llava_config, drive, tmp_path, mixed_tasks):
    """Answers have different lengths, so a mean of the small batches' means would be another loss."""
    results = []
    for name, size, steps in (("large", 8, 1), ("accumulated", 2, 4)):
        training = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "max_steps": 2,
            "optim": "sgd",
        }
        drive(
            llava_config(
                tmp_path / name, tasks=[str(mixed_tasks[0])], training=training, methods={"seq-lora": {}}
            )
        )
        results.append(load_deltas(tmp_path / name / "seq-lora/task-01-questions/delta.safetensors"))
    for layer, delta in results[0].items():
        torch.testing.assert_close(delta.dense(), results[1][layer].dense(), atol=1e-7, rtol=1e-3)
