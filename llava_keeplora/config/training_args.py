"""What a configuration hands to `transformers.TrainingArguments`."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_keeplora.config.coerce import as_mapping, coerce_value
from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora_recipes.strict_json import decode_text, parse_json

#: Arguments of `TrainingArguments` that say where and in how many pieces a step is computed and who watches,
#: not what it is.
MACHINE_ARGUMENTS = (
    "report_to",
    "run_name",
    "deepspeed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "activation_checkpointing",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "save_steps",
)

#: Arguments of `TrainingArguments` that may list a value for each task: what they are where nothing is said,
#: and what gives a new task its own.
PER_TASK = {"num_train_epochs": (1.0, "--epochs"), "learning_rate": (5e-5, "--learning-rate")}

#: Arguments of `TrainingArguments` that this package computes with → their types.
ARGUMENTS_READ = {
    **dict.fromkeys((*PER_TASK, "weight_decay"), float),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), int),
}

#: Arguments of `TrainingArguments` that the driver sets itself, and what to set instead.
DRIVER_ARGUMENTS = {
    "output_dir": "set the top-level output_dir",
    "seed": "set the top-level seed",
    "data_seed": "set the top-level seed",
    "save_strategy": "set training.save_steps, the steps between two checkpoints within a task",
    "eval_strategy": "every task is scored after each one",
    "remove_unused_columns": "the collator decides what the model sees",
    "resume_from_checkpoint": "run the same command again to go on",
    "do_train": "the driver trains",
}

#: Arguments of `TrainingArguments` that training fails with or goes without, the values that it does not, and
#: what to do instead.
WITHOUT = {
    "auto_find_batch_size": ((False,), "set a batch size that `llava-keeplora plan` says fits"),
    "batch_eval_metrics": ((False,), "every task is scored after each one"),
    "eval_on_start": ((False,), "every task is scored before the first one"),
    "fsdp": ((None, ""), "spread the training with training.deepspeed"),
    "label_smoothing_factor": ((0.0,), "use a method that has an option label_smoothing"),
    "neftune_noise_alpha": ((None,), "leave it out"),
    "parallelism_config": ((None,), "spread the training with training.deepspeed"),
    "push_to_hub": ((False,), "push what was learned with `llava-keeplora export --push`"),
    "train_sampling_strategy": (("random", "sequential"), "leave it out for a random order"),
    "use_liger_kernel": ((False,), "leave it out"),
}


def _argument_types() -> dict[str, Any]:
    """Return name → type of the arguments of `transformers.TrainingArguments`."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init}


def per_task(training: Mapping[str, Any], key: str, tasks: int) -> list[float]:
    """An argument of `PER_TASK` as it is listed, or the one number for so many tasks."""
    value = training.get(key, PER_TASK[key][0])
    return [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)] * tasks


def check_training(
    tree: Mapping[str, Any], where: str = "training", recorded: bool = False
) -> dict[str, Any]:
    """Check names and types of `training` against `transformers.TrainingArguments`.

    Args:
        tree: its keys and values.
        where: the dotted place, for error texts.
        recorded: whether a run wrote them after such a check; then `transformers`, which takes seconds to
            import, is not asked again, and only the arguments that this package computes with are checked.
    """
    hints = ARGUMENTS_READ if recorded else _argument_types()
    fields = {**hints, **dict.fromkeys(tree)} if recorded else hints
    out = {}
    for key, value in tree.items():
        if key in DRIVER_ARGUMENTS:
            raise ConfigError(f"{where}.{key} belongs to the driver", DRIVER_ARGUMENTS[key])
        if key not in fields:
            hint = nearest(str(key), fields)
            if not hint.startswith("did you mean"):
                hint = "https://huggingface.co/docs/transformers/main_classes/trainer lists them"
            raise ConfigError(f"{where}.{key} is not an argument of transformers.TrainingArguments", hint)
        if isinstance(value, (list, tuple)) and key in PER_TASK:
            out[key] = [coerce_value(v, float, f"{where}.{key}") for v in value]
        else:
            out[key] = coerce_value(value, hints[key], f"{where}.{key}") if key in hints else value
        if key in WITHOUT and out[key] not in WITHOUT[key][0]:
            raise ConfigError(
                f"{where}.{key} is {value!r}, which the driver's training does without", WITHOUT[key][1]
            )
    if out.get("weight_decay", 0.0) < 0:
        raise ConfigError(
            f"{where}.weight_decay is {out['weight_decay']}, but weights do not grow",
            "give a number from 0 on",
        )
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if out.get(key, 1) < 1:
            raise ConfigError(
                f"{where}.{key} is {out[key]}, but a step is made of something",
                "give a whole number from 1 on",
            )
    if isinstance(out.get("deepspeed"), str):
        read_deepspeed(Path(out["deepspeed"]), f"{where}.deepspeed")
    return out


def read_deepspeed(path: Path, where: str) -> dict[str, Any]:
    """The content of a DeepSpeed configuration.

    Raises:
        ConfigError: the file cannot be read, or holds no JSON object.
    """
    try:
        content = parse_json(decode_text(path.read_bytes()))
        # Plain data from here on: json.dumps would write what JSON has no word for.
        json.dumps(content, allow_nan=False)
    except (OSError, ValueError) as error:
        why = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{where} names '{path}', which {why}", "give the path of a DeepSpeed configuration in JSON"
        ) from error
    return as_mapping(content, where)
