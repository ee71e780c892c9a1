"""Training that is killed goes on from its last checkpoint, and ends as if nothing had happened."""

import json

import pytest
import torch

from llava_keeplora.journal import Journal
from llava_keeplora.saved_run import run_identity
from llava_keeplora.sequence import train_stage, trainer
from llava_keeplora.sequence.checkpoint import StepCheckpoint, TrainingState, load_optimizer, optimizer_state

SETTINGS = {
    "one epoch": {},
    "two epochs of accumulated steps": {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "save_steps": 2,
    },
    "half precision with a scheduler and momentum": {
        "bf16": True,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
    },
}


@pytest.fixture
def steps(monkeypatch):
    """The steps whose batches were learned from, in the order in which they were made."""
    made = []
    inner = trainer.TaskTrainer.training_step

    def count(self, *args, **kwargs):
        made.append(self.state.global_step)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(trainer.TaskTrainer, "training_step", count)
    return made


def one_task(build, tiny, tmp_path, name, training):
    return build(
        tmp_path / name, tasks=[str(tiny[0])], training={"save_steps": 1, "logging_steps": 2, **training}
    )


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("method", [pytest.param("seq-lora", marks=pytest.mark.slow), "keeplora"])
def test_training_goes_on_from_the_last_checkpoint_bit_for_bit(
    run_config,
    drive,
    run_to_the_end,
    stop_within_training,
    steps,
    tmp_path,
    tiny_tasks,
    left_behind,
    one_label,
    settings,
    method,
):
    training = SETTINGS[settings]

    def build(name):
        return one_task(
            lambda *a, **k: run_config(*a, **k, **one_label(method)), tiny_tasks, tmp_path, name, training
        )

    drive(build("undisturbed"))
    whole = list(steps)
    steps.clear()
    stop_within_training(3 if settings.startswith("two") else 2)
    assert run_to_the_end(build("killed")) == 2

    # A step was lost: it was made, and killed before its checkpoint.
    repeated = 3 if settings.startswith("two") else 1
    assert len(steps) == len(whole) + repeated, "no other step is made twice"
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "undisturbed")
    assert not list((tmp_path / "killed").rglob("training*")), "a trained task keeps no checkpoint"


def test_what_a_loss_asks_of_the_model_is_counted_once_however_often_a_training_is_stopped(
    run_config, run_to_the_end, stop_within_training, tmp_path, tiny_tasks, one_label
):
    stop_within_training(2)
    config = one_task(
        lambda *a, **k: run_config(*a, **k, **one_label("lwf")), tiny_tasks, tmp_path, "killed", {}
    )
    assert run_to_the_end(config) == 2
    (info,) = [e.info for e in Journal(tmp_path / "killed/lwf/journal.jsonl").entries if e.stage == "TRAINED"]
    # The teacher answers every example of the training once.
    assert info["passes"] == {"forward": info["examples"]["1"]} and info["examples"]["1"] % 24 == 0


def test_what_a_step_learns_from_besides_its_batch_is_trained_on_however_often_it_is_stopped(
    llava_config, run_to_the_end, stop_within_training, tmp_path, mixed_tasks, one_label
):
    stop_within_training(2)
    config = one_task(
        lambda *a, **k: llava_config(*a, **k, **one_label("self-distillation")),
        mixed_tasks,
        tmp_path,
        "run",
        {},
    )
    assert run_to_the_end(config) == 2
    journal = Journal(tmp_path / "run/self-distillation/journal.jsonl")
    (info,) = [e.info for e in journal.entries if e.stage == "TRAINED"]
    # Three batches of 8, and as many answers of its own, which the teacher is asked about as well.
    assert (info["examples"], info["further_examples"], info["passes"]) == ({"1": 48}, 24, {"forward": 24})


@pytest.mark.slow
def test_a_llava_with_dropout_and_rates_of_its_parts_goes_on_bit_for_bit(
    llava_config, drive, run_to_the_end, stop_within_training, tmp_path, mixed_tasks, left_behind
):
    changes = {
        "methods": {"released-llava": {"method": "keeplora", "preset": "released-llava"}},
        "parts": {"vision": {"learning_rate": 5e-4}},
    }

    def build(name):
        return one_task(lambda *a, **k: llava_config(*a, **k, **changes), mixed_tasks, tmp_path, name, {})

    drive(build("undisturbed"))
    stop_within_training(2)
    assert run_to_the_end(build("killed")) == 2
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "undisturbed")


def test_a_training_on_random_crops_goes_on_bit_for_bit_and_is_another_than_without(
    run_config, drive, run_to_the_end, stop_within_training, tmp_path, tiny_tasks, left_behind, outcome
):
    def build(name, crop):
        return one_task(
            lambda *a, **k: run_config(*a, **k, methods={"seq-lora": {"random_resized_crop": crop}}),
            tiny_tasks,
            tmp_path,
            name,
            {},
        )

    drive(build("undisturbed", [0.5, 0.9]))
    drive(build("whole", None))
    stop_within_training(2)
    assert run_to_the_end(build("killed", [0.5, 0.9])) == 2
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "undisturbed")
    deltas = [
        next(value for name, value in outcome(tmp_path / run).items() if name.endswith("delta.safetensors"))
        for run in ("undisturbed", "whole")
    ]
    assert deltas[0] != deltas[1]


@pytest.mark.slow
def test_training_stopped_after_its_last_step_ends_with_the_same_files(
    run_config, drive, run_to_the_end, stopped, monkeypatch, tmp_path, tiny_tasks, left_behind, one_label
):
    def build(name):
        return one_task(
            lambda *a, **k: run_config(*a, **k, **one_label("keeplora")), tiny_tasks, tmp_path, name, {}
        )

    drive(build("undisturbed"))
    save, calls = train_stage.save_deltas, []

    def stop_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise stopped
        return save(*args)

    monkeypatch.setattr(train_stage, "save_deltas", stop_once)
    assert run_to_the_end(build("killed")) == 2
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "undisturbed")


def test_a_damaged_checkpoint_costs_the_tasks_steps_and_nothing_else(
    run_config,
    drive,
    run_to_the_end,
    stop_within_training,
    stopped,
    tmp_path,
    tiny_tasks,
    left_behind,
    one_label,
    caplog,
    steps,
):
    def build(name):
        return one_task(
            lambda *a, **k: run_config(*a, **k, **one_label("keeplora")), tiny_tasks, tmp_path, name, {}
        )

    drive(build("undisturbed"))
    stop_within_training(2)
    with pytest.raises(stopped):
        drive(build("killed"))
    (tensors,) = (tmp_path / "killed").rglob("training-1.safetensors")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    steps.clear()
    drive(build("killed"))
    assert steps == [0, 1, 2] and "the task's training begins again" in caplog.text
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "undisturbed")


def test_an_optimisers_state_comes_back_through_safetensors_and_json(tmp_path):
    def trained(steps, optimizer, parameter):
        for step in steps:
            parameter.grad = torch.sin(parameter.detach() + step)
            optimizer.step()

    for kind in (torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.Adagrad):
        whole, begun, gone_on = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
        trained(range(4), kind([whole]), whole)
        first = kind([begun])
        trained(range(2), first, begun)
        state = optimizer_state(first)
        StepCheckpoint(tmp_path).write(
            2,
            TrainingState(
                {"p": begun.detach(), **{f"o.{k}": v for k, v in state.tensors.items()}}, state.values
            ),
        )
        back = StepCheckpoint(tmp_path).read()
        second = kind([gone_on])
        gone_on.data.copy_(back.tensors["p"])
        load_optimizer(second, back.under("o"), back.values)
        trained(range(2, 4), second, gone_on)
        assert torch.equal(gone_on, whole)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1, "one state is kept"


def test_how_often_training_is_kept_is_no_part_of_a_runs_identity(run_config, tmp_path):
    often, seldom = (run_identity(run_config(tmp_path / "run", training={"save_steps": n})) for n in (1, 100))
    assert json.dumps(often) == json.dumps(seldom)


@pytest.fixture
def checkpoint(tmp_path):
    """One with values as a Trainer's."""
    values = {
        "schedule": {"last_epoch": 2, "_last_lr": [0.1]},
        "optimizer": {"param_groups": [{"betas": [0.9, 0.999], "weight_decay": 0.01, "params": [0]}]},
        "losses": {"_total": 1.5},
    }
    checkpoint = StepCheckpoint(tmp_path)
    checkpoint.write(2, TrainingState({"weights.a": torch.ones(2)}, values))
    assert checkpoint.read().values == values
    return checkpoint


def test_every_single_flipped_bit_of_a_checkpoints_record_is_noticed(checkpoint, caplog):
    """But for white space, which says nothing, every one makes the task's training begin again."""
    whole = checkpoint.path.read_bytes()
    for position in range(len(whole)):
        for bit in range(0, 8, 3):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            checkpoint.path.write_bytes(changed)
            caplog.clear()
            state = checkpoint.read()
            if state is None:
                assert (
                    "training.json and its tensors are damaged" in caplog.text
                    and "training begins again" in caplog.text
                )
            else:
                assert json.loads(changed) == json.loads(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["values"]["schedule"].update(last_epoch=1),
        lambda record: record["values"]["optimizer"]["param_groups"][0].update(weight_decay=0.0),
        lambda record: record["values"]["optimizer"]["param_groups"][0].update(betas=[0.8, 0.999]),
        lambda record: record.pop("values"),
        lambda record: record.pop("record_sha256"),
        lambda record: record.update(values=[]),
        lambda record: record.update(tensors="../outside.safetensors"),
        lambda record: record.update(sha256={}),
    ],
)
def test_a_changed_value_makes_the_training_begin_again(checkpoint, change):
    record = json.loads(checkpoint.path.read_text())
    change(record)
    checkpoint.path.write_text(json.dumps(record))
    assert checkpoint.read() is None


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "\x00"])
def test_a_record_that_is_none_makes_the_training_begin_again(checkpoint, text):
    checkpoint.path.write_text(text)
    assert checkpoint.read() is None
