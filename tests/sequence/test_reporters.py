"""Trackers of `training.report_to` see every task under its own name."""

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from llava_keeplora.errors import ConfigError
from llava_keeplora.start import training_args

TASKS = ["task-01-colours", "task-02-stripes"]


@pytest.fixture
def watched(run_config, tiny_tasks, one_label):
    """Function (output_dir, **training) → a run of sequential LoRA on two tasks that logs every step."""

    def build(output_dir, **training):
        changes = {
            "tasks": [str(path) for path in tiny_tasks[:2]],
            "training": {"logging_steps": 1, **training},
        }
        return run_config(output_dir, **changes, **one_label("seq-lora"))

    return build


def scalars(folder):
    """tag → its (step, value) as TensorBoard itself reads them."""
    pytest.importorskip("tensorboard", reason="the tensorboard package is not installed: 2 checks left out")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_gets_a_run_per_task_and_what_the_task_learned(watched, drive, tmp_path):
    import json

    drive(watched(tmp_path / "run", report_to="tensorboard"))
    for task in TASKS:
        folder = tmp_path / "run/seq-lora" / task
        logged = [
            (r["step"], r["loss"])
            for r in json.loads((folder / "train.json").read_text())["history"]
            if "loss" in r
        ]
        assert len(logged) == 3 and scalars(folder)["train/loss"] == [
            (step, pytest.approx(loss)) for step, loss in logged
        ]
    assert sorted(p.parent.name for p in (tmp_path / "run").rglob("events.out.*")) == TASKS


def test_tensorboards_own_folder_wins_and_a_killed_attempt_leaves_no_curve(
    watched, run_to_the_end, stop_within_training, tmp_path, monkeypatch
):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    with monkeypatch.context():
        stop_within_training(2)
        assert run_to_the_end(watched(tmp_path / "run", report_to="tensorboard")) == 3
    for task in TASKS:
        assert [step for step, _ in scalars(tmp_path / "elsewhere/seq-lora" / task)["train/loss"]] == [
            1,
            2,
            3,
        ]
    assert list((tmp_path / "run").rglob("events.out.*")) == []


class Recorder(TrainerCallback):
    """Stands for any tracker: keeps what it is told by the name of the run."""

    seen: dict[str, list] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.setdefault(args.run_name, []).append(logs)


@pytest.fixture
def recorder(monkeypatch):
    """A tracker that transformers knows and finds installed as `recorder`."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    monkeypatch.setattr(training_args, "ALWAYS", {"recorder"})
    monkeypatch.setattr(Recorder, "seen", {})
    return Recorder


def test_any_tracker_receives_run_method_and_task(watched, drive, tmp_path, recorder):
    drive(watched(tmp_path / "run", report_to=["recorder"]))
    assert list(recorder.seen) == [f"run/seq-lora/{task}" for task in TASKS]
    assert [sum("loss" in logs for logs in told) for told in recorder.seen.values()] == [3, 3]


def test_a_run_name_of_the_users_own_takes_the_place_of_the_folders(watched, drive, tmp_path, recorder):
    drive(watched(tmp_path / "run", report_to="recorder", run_name="mine"))
    assert list(recorder.seen) == [f"mine/seq-lora/{task}" for task in TASKS]


def test_a_run_may_go_on_with_another_tracker(watched, drive, tmp_path, recorder):
    drive(watched(tmp_path / "run"))
    drive(watched(tmp_path / "run", report_to="recorder", run_name="again"))
    assert recorder.seen == {}


def test_weights_and_biases_has_a_run_per_task_too(watched, drive, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the wandb package is not installed: 1 check left out")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    names, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **settings: names.append(settings["name"]) or init(**settings))
    drive(watched(tmp_path / "run", report_to="wandb"))
    assert names == [f"run/seq-lora/{task}" for task in TASKS] and wandb.run is None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "tensorbord",
            "training.report_to names 'tensorbord', which transformers does not know; did you mean 'tensorboard'",
        ),
        (
            "comet_ml",
            "training.report_to names 'comet_ml', whose package is not installed; pip install comet-ml, or leave it out",
        ),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_scored(
    watched, drive, tmp_path, name, sentence
):
    with pytest.raises(ConfigError) as error:
        drive(watched(tmp_path / "run", report_to=name))
    assert sentence in str(error.value)
    assert not list((tmp_path / "run").rglob("scores.json"))
