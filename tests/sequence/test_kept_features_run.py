"""Image features at a task's start in whole runs: computed once, looked up by example, the same after a kill."""

import json

import pytest
import torch

from llava_keeplora.methods.task_start import TaskStart
from llava_keeplora.sequence import passes
from llava_keeplora.sequence.data import Batches
from llava_keeplora.sequence.trainer import TaskTrainer


@pytest.fixture
def config(run_config, tiny_tasks):
    """Function (folder, epochs, training arguments, settings of the method) → a run of it on two tasks."""

    def build(folder, epochs=2, training=None, **settings):
        row = {"method": "keeplora", "preset": "balanced"} if "method" not in settings else {}
        methods = {"balanced": row | settings}
        training = {"num_train_epochs": epochs} | (training or {})
        return run_config(folder, methods=methods, tasks=[str(t) for t in tiny_tasks[:2]], training=training)

    return build


@pytest.fixture
def losses(monkeypatch):
    """The losses of every batch of the trainings that follow."""
    compute_loss, seen = TaskTrainer.compute_loss, []

    def record(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        seen.append(loss.detach().clone())
        return loss

    monkeypatch.setattr(TaskTrainer, "compute_loss", record)
    return seen


def other_passes(folder):
    """Examples of every task's training that went through the model besides training's own."""
    entries = [json.loads(line) for line in (folder / "balanced/journal.jsonl").read_text().splitlines()]
    return [entry["info"].get("passes", {}) for entry in entries if entry["stage"] == "TRAINED"]


@pytest.mark.parametrize(
    "settings", [{}, {"method": "eblora", "distillation": 10.0}], ids=["keeplora", "eblora"]
)
def test_features_that_are_looked_up_are_those_of_a_pass_in_every_step(
    config, drive, losses, monkeypatch, tmp_path, settings
):
    output, farthest = TaskStart.output, []

    def compare(self, ctx, batch, compute):
        looked_up = output(self, ctx, batch, compute)
        with self.restored():
            farthest.append(float((looked_up - compute(batch)).abs().max()))
        return looked_up

    monkeypatch.setattr(TaskStart, "output", compare)
    drive(config(tmp_path / "once", **settings))
    assert len(farthest) == len(losses) == 2 * 6 and max(farthest) < 1e-6


def test_the_losses_are_those_of_a_pass_in_every_step(config, drive, losses, monkeypatch, tmp_path):
    drive(config(tmp_path / "once"))
    once = losses.copy()
    losses.clear()
    monkeypatch.setattr(passes, "_repeats", lambda state, index: False)
    drive(config(tmp_path / "each"))
    torch.testing.assert_close(torch.stack(once), torch.stack(losses), rtol=1e-4, atol=1e-5)
    # 24 images, seen in 2 epochs.
    assert other_passes(tmp_path / "once") == 2 * [{"forward": 24}]
    assert other_passes(tmp_path / "each") == 2 * [{"forward": 48}]


@pytest.mark.parametrize("step", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_killed_within_training_ends_bit_for_bit_as_in_one_go(
    config, drive, run_to_the_end, stop_within_training, left_behind, tmp_path, step
):
    drive(config(tmp_path / "whole", training={"save_steps": 1}))
    stopped = stop_within_training(step)
    assert run_to_the_end(config(tmp_path / "killed", training={"save_steps": 1})) == 3 and stopped == [1, 2]
    # The journals also, with the passes that were counted.
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "whole")


@pytest.mark.parametrize(
    ("epochs", "settings", "seen"),
    [(0.4, {}, 16), (1, {}, 24), (2, {"random_resized_crop": [0.5, 1.0]}, 48)],
    ids=["part-of-an-epoch", "one-epoch", "random-crops"],
)
def test_a_step_computes_its_own_where_no_image_is_seen_twice(
    config, drive, monkeypatch, tmp_path, epochs, settings, seen
):
    monkeypatch.setattr(TaskStart, "keep", lambda *args: pytest.fail("all features were computed"))
    drive(config(tmp_path / "run", epochs, **settings))
    assert other_passes(tmp_path / "run") == 2 * [{"forward": seen}]


def test_an_individual_row_of_the_preset_looks_features_up_as_well(run_config, tiny_tasks, drive, tmp_path):
    row = {"method": "individual", "of": "keeplora", "settings": {"preset": "balanced"}}
    training = {"num_train_epochs": 2}
    tasks = [str(tiny_tasks[0])]
    drive(run_config(tmp_path / "run", methods={"balanced": row}, tasks=tasks, training=training))
    assert other_passes(tmp_path / "run") == [{"forward": 24}]


class Numbers:
    """Examples that are their own index."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def collate(self, indices):
        return {"labels": torch.tensor(indices)}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4, 7, 12, 13])
def test_an_output_pass_returns_a_row_per_example_from_every_process(world, count, monkeypatch):
    parts, calls = [], []
    for rank in range(world):
        batches = Batches(Numbers(count), 2, 1.0, rank, world)
        monkeypatch.setattr(passes, "_batches", lambda *args, b=batches: (iter(b), b))
        made = []

        def compute(batch, made=made):
            made.append(batch)
            return torch.stack([batch["labels"] + 1, batch["labels"] ** 2], dim=1)

        # A process alone: the sum over processes is left to the test.
        parts.append(passes.run_output_pass(None, 1, compute))
        calls.append(len(made))
    rows = torch.arange(count)
    assert torch.equal(sum(parts), torch.stack([rows + 1, rows**2], dim=1).float())
    assert len(set(calls)) == 1, "with ZeRO-3, every process must run as many passes"
