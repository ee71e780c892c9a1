"""Where a training is watched (`training.report_to`): every task under a name of its own."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.integrations import TensorBoardCallback, WandbCallback

from llava_keeplora.sequence.trainer import TaskTrainer

EVENTS = "events.out.tfevents.*"


def give_own_place(trainer: TaskTrainer, root: Path, tag: str) -> None:
    """Let TensorBoard keep a task's curves in a folder of their own.

    What a killed attempt left there goes, unless it is gone on with.

    Other trackers take the task from `run_name`.

    Args:
        trainer: of the task.
        root: the run folder; `TENSORBOARD_LOGGING_DIR` wins over it.
        tag: of the task, `LABEL/task-NN-NAME`.
    """
    folder = Path(os.path.expanduser(os.environ.get("TENSORBOARD_LOGGING_DIR") or root)) / tag
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(folder)
            if trainer.is_world_process_zero() and not trainer.steps_before:
                for stale in folder.glob(EVENTS):
                    stale.unlink()


def end_own_place(trainer: TaskTrainer) -> None:
    """End the task's run where a tracker would go on with it: Weights & Biases keeps one run per process."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, WandbCallback) and trainer.is_world_process_zero():
            import wandb

            wandb.finish()
