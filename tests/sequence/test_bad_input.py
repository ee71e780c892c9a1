"""Each mistake is one sentence, and nothing already computed is lost by it."""

import logging

import pytest
import torch
import yaml

from llava_keeplora.errors import ConfigError, MethodError, RunError, TrainingError, UserError
from llava_keeplora.methods import METHODS
from llava_keeplora.sequence.workspace import Workspace
from llava_keeplora_recipes import RecipeError


@pytest.fixture
def short(run_config, tiny_tasks):
    """Function (output_dir, **changes) → a run of KeepLoRA on the first task."""
    return lambda output_dir, **changes: run_config(
        output_dir, **{"methods": {"keeplora": {}}, "tasks": [str(tiny_tasks[0])]} | changes
    )


def files_of(root):
    return {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


# --- the run folder ------------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_refused(short, drive, tmp_path):
    config = short(tmp_path / "run")
    with (
        Workspace(config).locked(),
        pytest.raises(
            RunError, match=r"another run \(process \d+\) is working in .*; wait for it, stop it, or choose"
        ),
    ):
        drive(config)
    drive(config)


def test_a_run_goes_on_with_another_budget_for_statistics(short, drive, tmp_path):
    drive(short(tmp_path / "run"))
    before = files_of(tmp_path / "run/keeplora")
    drive(short(tmp_path / "run", memory={"statistics_gb": 1.0}))
    assert files_of(tmp_path / "run/keeplora").keys() == before.keys()


def test_a_folder_of_another_configuration_is_refused_with_the_difference(short, drive, tmp_path):
    drive(short(tmp_path / "run"))
    before = files_of(tmp_path / "run")
    with pytest.raises(RunError) as caught:
        drive(short(tmp_path / "run", training={"learning_rate": 0.5}, parts={"text": {"rank": 1}}))
    sentence = str(caught.value)
    assert (
        "parts.text.rank: 2 → 1; training.learning_rate: 0.01 → 0.5" in sentence
        and "methods." not in sentence
    )
    assert "restore these values to go on, or choose another output_dir" in sentence
    assert files_of(tmp_path / "run") == before


def test_a_change_of_one_method_is_reported_of_that_method(short, drive, tmp_path):
    drive(short(tmp_path / "run"))
    with pytest.raises(RunError, match="methods.keeplora.options.gradient_fraction: 'auto' → 0.5"):
        drive(short(tmp_path / "run", methods={"keeplora": {"gradient_fraction": 0.5}}))


def test_another_evaluation_batch_size_or_place_of_the_data_is_no_other_run(short, drive, tmp_path):
    drive(short(tmp_path / "run"))
    drive(short(tmp_path / "run", evaluation={"batch_size": 2}, data={"cache_gb": 0}))


def test_a_folder_of_something_else_is_refused_and_left_alone(short, drive, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("dear")
    with pytest.raises(
        RunError, match="is not a run folder but holds thesis.tex; choose an empty or new output_dir"
    ):
        drive(short(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_made_is_refused(short, drive, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(RunError, match=r"cannot be written \(.*\); choose another output_dir"):
            drive(short(tmp_path / place))


def test_a_kill_while_the_folder_is_claimed_is_no_hindrance(short, drive, tmp_path):
    config = short(tmp_path / "run")
    with Workspace(config).locked():
        Workspace(config).claim()
    (tmp_path / "run/config.json").unlink()
    drive(config)


def test_a_tampered_artefact_is_refused_before_anything_runs(short, drive, tmp_path):
    config = short(tmp_path / "run")
    drive(config)
    delta = tmp_path / "run/keeplora/task-01-colours/delta.safetensors"
    delta.write_bytes(delta.read_bytes()[:-1] + b"!")
    with pytest.raises(RunError, match="delta.safetensors is not what stage TRAINED of task 1 wrote"):
        drive(config)


def test_a_journal_out_of_order_is_refused_by_name(short, drive, tmp_path):
    config = short(tmp_path / "run")
    drive(config)
    journal = tmp_path / "run/keeplora/journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(RunError, match="keeplora/journal.jsonl: the journal's stages are out of order"):
        drive(config)


# --- the data ------------------------------------------------------------------------------------


def test_data_changed_after_planning_is_refused_by_task(run_config, own_tasks, drive, tmp_path):
    config = run_config(tmp_path / "run", methods={"seq-lora": {}}, tasks=[str(p) for p in own_tasks[:2]])
    drive(config)
    folder = own_tasks[0].parent / "colours/train"
    (folder / "red/0.png").write_bytes((folder / "red/1.png").read_bytes())
    with pytest.raises(RunError) as caught:
        drive(config)
    assert "task 'colours' has changed" in str(caught.value) and "train.fingerprint: '" in str(caught.value)
    assert "restore its data and recipe to go on, or choose another output_dir" in str(caught.value)


def test_a_recipe_changed_after_planning_is_refused_by_task(run_config, own_tasks, drive, tmp_path):
    config = run_config(tmp_path / "run", methods={"seq-lora": {}}, tasks=[str(p) for p in own_tasks[:2]])
    drive(config)
    facts = yaml.safe_load(own_tasks[1].read_text())
    own_tasks[1].write_text(yaml.safe_dump(facts | {"prompt": "the {c} ."}))
    with pytest.raises(RunError, match="task 'stripes' has changed .*recipe_fingerprint"):
        drive(config)


def test_a_vanished_data_root_is_one_sentence(run_config, own_tasks, drive, tmp_path):
    config = run_config(
        tmp_path / "run",
        methods={"seq-lora": {}},
        tasks=[str(own_tasks[0])],
        data={"root": str(tmp_path / "gone")},
    )
    with pytest.raises(UserError, match="gone"):
        drive(config)


def test_a_task_named_twice_is_refused(short, drive, tmp_path, tiny_tasks):
    with pytest.raises(RecipeError, match="task 'colours' is in the sequence 2 times; name each task once"):
        drive(short(tmp_path / "run", tasks=[str(tiny_tasks[0])] * 2))


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


def test_truncated_images_are_refused_with_name_and_count(run_config, own_tasks, drive, tmp_path):
    folder = own_tasks[0].parent / "colours/train"
    truncate(folder / "red/0.png"), truncate(folder / "blue/3.png")
    with pytest.raises(UserError) as caught:
        drive(run_config(tmp_path / "run", methods={"seq-lora": {}}, tasks=[str(own_tasks[0])]))
    assert "2 of 24 images of colours/train cannot be read" in str(caught.value)
    assert "red/0.png" in str(caught.value) and "on_bad_image: drop" in str(caught.value)


def test_dropped_images_are_recorded_where_the_results_are(run_config, own_tasks, drive, tmp_path, caplog):
    import json

    truncate(own_tasks[0].parent / "colours/train/red/0.png")
    config = run_config(
        tmp_path / "run", methods={"seq-lora": {}}, tasks=[str(own_tasks[0])], data={"on_bad_image": "drop"}
    )
    caplog.set_level(logging.WARNING)
    drive(config)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["tasks"][0]["train"]["n"] == 23 and len(results["tasks"][0]["train"]["dropped"]) == 1
    planned = json.loads((tmp_path / "run/seq-lora/journal.jsonl").read_text().splitlines()[0])
    assert planned["info"]["tasks"][0]["train"]["dropped"] == results["tasks"][0]["train"]["dropped"]
    assert "colours/train: 1 unreadable image was left out of 24" in caplog.text


def test_what_is_worth_a_look_in_a_task_is_logged_and_kept(run_config, own_tasks, caplog):
    from llava_keeplora.start import load_tasks

    folder = own_tasks[0].parent / "colours"
    twice = (folder / "train/red/0.png").read_bytes()
    for name in ("train/blue/twice.png", "test/red/twice.png"):
        (folder / name).write_bytes(twice)
    (folder / "train/red/photo.heic").write_bytes(b"x")
    (task,) = load_tasks(
        run_config(folder.parent / "run", methods={"seq-lora": {}}, tasks=[str(own_tasks[0])])
    )
    files, labels, both = task.notes()
    assert files.startswith("colours/train: 1 files are not read and left out (.heic: 1; ")
    assert labels.startswith("colours/train: 1 images are under several labels (")
    assert both.startswith("colours/test: 1 different images are in 'train' too (")
    assert all(note in caplog.text for note in (files, labels, both)) and task.decoding_note() == ""


def test_a_run_of_images_that_were_decoded_otherwise_is_refused_with_the_reason(run_config, own_tasks):
    from types import SimpleNamespace

    from PIL import Image

    from llava_keeplora.sequence.method_run import MethodRun
    from llava_keeplora.start import load_tasks

    path = own_tasks[0].parent / "colours/train/red/0.png"
    Image.new("RGBA", (16, 16), (0, 0, 0, 128)).save(path)
    tasks = load_tasks(
        run_config(path.parents[3] / "run", methods={"seq-lora": {}}, tasks=[str(own_tasks[0])])
    )
    old = tasks[0].record()
    old["train"] = old["train"] | {"fingerprint": "of the bytes alone"}
    context = SimpleNamespace(config=SimpleNamespace(seed=0), general={}, tasks=tasks)
    run = SimpleNamespace(
        tasks=tasks,
        folder="run",
        config=SimpleNamespace(label="seq-lora"),
        context=context,
        averaged=False,
        method=SimpleNamespace(reference=None),
    )
    run._decoding_note = lambda key, record: MethodRun._decoding_note(run, key, record)
    entry = SimpleNamespace(task=0, info={"tasks": [old]})
    with pytest.raises(
        RunError, match="train.fingerprint: .*; 1 of its images have transparency or an EXIF orient"
    ):
        MethodRun._check_plan(run, entry)


# --- the model and the method --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"parts": {"visoin": {}}},
            "parts names 'visoin', which this model does not have; did you mean 'vision'",
        ),
        (
            {"parts": {"vision": {"targets": ["q_prj"]}}},
            "parts.vision.targets names 'q_prj', which matches no linear layer of that part; did you mean 'q_proj'",
        ),
        (
            {"parts": None},
            "the run adapts no part of the model; name at least one of vision, text under `parts`",
        ),
        ({"model": {"dtype": "float8"}}, "model.dtype is 'float8'"),
        ({"model": {"name_or_path": "nowhere/at-all"}}, "the model 'nowhere/at-all' cannot be loaded"),
        (
            {"training": {"gradient_checkpointing_kwargs": {"use_reentrant": True}}},
            "training.gradient_checkpointing_kwargs.use_reentrant is true, but",
        ),
        (
            {"training": {"lr_scheduler_type": "zigzag"}},
            "transformers refuses the training arguments of 'keeplora' (zigzag is not a valid SchedulerType",
        ),
    ],
)
def test_what_the_model_or_the_trainer_cannot_do_is_refused_before_any_stage(
    short, drive, tmp_path, changes, words
):
    with pytest.raises(ConfigError) as caught:
        drive(short(tmp_path / "run", **changes))
    assert words in str(caught.value)
    assert not list((tmp_path / "run").rglob("journal.jsonl"))


def test_a_rank_larger_than_the_residual_space_names_the_layer(short, drive, tmp_path):
    with pytest.raises(MethodError) as caught:
        drive(short(tmp_path / "run", parts={"vision": {"rank": 20, "energy_weight": 0.99}}))
    sentence = str(caught.value)
    assert "layer vision_model.encoder.layers.0." in sentence and "fewer than the rank 20" in sentence
    assert "lower parts.vision.rank or parts.vision.energy_weight" in sentence
    assert not list((tmp_path / "run").rglob("journal.jsonl"))


# --- training ------------------------------------------------------------------------------------


@pytest.fixture
def nan_once(monkeypatch):
    """From a task's second step on, the loss is NaN, while the list holds anything."""
    cls, active = METHODS["keeplora"], [True]
    plain = cls.loss

    def loss(self, ctx, batch, out):
        self.steps = getattr(self, "steps", 0) + 1
        value = plain(self, ctx, batch, out)
        return value * float("nan") if active and ctx.index == 2 and self.steps >= 5 else value

    monkeypatch.setattr(cls, "loss", loss)
    return active


def test_a_nan_loss_stops_the_task_names_the_step_and_the_same_command_goes_on(
    run_config, drive, tmp_path, nan_once, left_behind
):
    config = run_config(tmp_path / "run", methods={"keeplora": {}})
    with pytest.raises(
        TrainingError,
        match="the loss of task 'stripes' is nan at step 2; start in a new output_dir with a lower training.learning_rate",
    ):
        drive(config)
    kept = files_of(tmp_path / "run/keeplora/task-01-colours")
    assert any(p.name == "delta.safetensors" for p in kept)
    nan_once.clear()
    drive(config)
    assert files_of(tmp_path / "run/keeplora/task-01-colours") == kept
    drive(run_config(tmp_path / "undisturbed", methods={"keeplora": {}}))
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "undisturbed")


def test_weights_that_overflow_in_the_last_step_are_not_kept(short, drive, tmp_path):
    with pytest.raises(
        TrainingError,
        match="(the weights of task 'colours' are not finite after its|the loss of task 'colours' is nan)",
    ):
        drive(short(tmp_path / "run", training={"learning_rate": 1e38, "max_grad_norm": 0.0}))
    assert not (tmp_path / "run/keeplora/task-01-colours/delta.safetensors").exists()


def test_the_model_is_as_it_was_after_a_failed_training(short, drive, tmp_path, monkeypatch):
    import llava_keeplora.sequence.runner as runner

    loaded = []
    load = runner.open_model
    monkeypatch.setattr(runner, "open_model", lambda *given: loaded.append(load(*given)) or loaded[-1])
    monkeypatch.setattr(METHODS["keeplora"], "loss", lambda self, ctx, batch, out: out["loss"] * float("nan"))
    with pytest.raises(TrainingError):
        drive(short(tmp_path / "run"))
    assert not [name for name, _ in loaded[0].model.named_modules() if "lora" in name]
    assert all(torch.isfinite(p).all() for p in loaded[0].model.parameters())


# --- several processes ---------------------------------------------------------------------------


def test_a_split_of_examples_with_and_without_images_is_refused_where_processes_gather_weights_together():
    from types import SimpleNamespace

    from llava_keeplora.start.check import check_images

    def task(*counts):
        class Data(list):
            image_counts = list(counts)

        return SimpleNamespace(name="science", train=Data(counts), test=Data((1,)))

    check_images([task(1, 2, 1), task(0, 0)])
    with pytest.raises(
        ConfigError,
        match="^2 of the 3 examples of science/train have no image, but with ZeRO-3 .*; use ZeRO-2 or one process",
    ):
        check_images([task(1, 1), task(0, 1, 0)])
