"""Where a training is watched (`training.report_to`): installed or refused, and every task under a name of its own."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback, get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora.sequence.trainer import TaskTrainer

EVENTS = "events.out.tfevents.*"
#: Used without a package that transformers could look for.
ALWAYS = {"azure_ml", "flyte"}


def check_reporters(arguments: TrainingArguments) -> None:
    """Refuse a tracker that isn't there before anything is trained; transformers itself would only after the zero-shot row.

    Raises:
        ConfigError: naming the first one that transformers doesn't know or whose package is missing.
    """
    for name in arguments.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"training.report_to names '{name}', which transformers does not know", nearest(name, INTEGRATION_TO_CALLBACK))
        if name not in {*get_available_reporting_integrations(), *ALWAYS}:
            raise ConfigError(f"training.report_to names '{name}', whose package is not installed", f"pip install {name.replace('_', '-')}, or leave it out")


def give_own_place(trainer: TaskTrainer, root: Path, tag: str) -> None:
    """Let TensorBoard keep a task's curves in a folder of their own; what a killed attempt left there goes, unless it is gone on with.

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
