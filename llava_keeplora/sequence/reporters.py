"""Experiment trackers (`training.report_to`): every task is shown as a run of its own."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.integrations import TensorBoardCallback, WandbCallback

from llava_keeplora.sequence.trainer import TaskTrainer

EVENTS = "events.out.tfevents.*"


def give_own_place(trainer: TaskTrainer, root: Path, tag: str) -> None:
    """Let TensorBoard write a task's curves into a folder of their own.

    Event files of a killed attempt are deleted, unless training resumes from its checkpoint. Other trackers
    tell tasks apart by `run_name`.

    Args:
        trainer: the task's trainer.
        root: the run folder; `TENSORBOARD_LOGGING_DIR` takes precedence.
        tag: the task's tag, `LABEL/task-NN-NAME`.
    """
    folder = Path(os.path.expanduser(os.environ.get("TENSORBOARD_LOGGING_DIR") or root)) / tag
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(folder)
            if trainer.is_world_process_zero() and not trainer.steps_before:
                for stale in folder.glob(EVENTS):
                    stale.unlink()


def end_own_place(trainer: TaskTrainer) -> None:
    """End the task's run in Weights & Biases, which otherwise keeps one run per process."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, WandbCallback) and trainer.is_world_process_zero():
            import wandb

            wandb.finish()
