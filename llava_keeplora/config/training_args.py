"""Rules for the arguments of `transformers.TrainingArguments` in a configuration."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_keeplora.bitsandbytes_import import import_bitsandbytes
from llava_keeplora.coerce import as_mapping, coerce_value
from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora_recipes.strict_json import decode_text, parse_json

#: Arguments of `TrainingArguments` that affect where and in how many pieces a step is computed, or who
#: watches, but not its result.
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

#: Training arguments that accept one value per task: name → (default, the `extend` flag that sets it).
PER_TASK = {"num_train_epochs": (1.0, "--epochs"), "learning_rate": (5e-5, "--learning-rate")}

#: Arguments of `TrainingArguments` that this package reads itself → their types.
ARGUMENTS_READ = {
    **dict.fromkeys((*PER_TASK, "weight_decay"), float),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), int),
}

#: Arguments of `TrainingArguments` that the driver sets → what to set instead.
DRIVER_ARGUMENTS = {
    "output_dir": "set the top-level output_dir",
    "seed": "set the top-level seed",
    "data_seed": "set the top-level seed",
    "save_strategy": "set training.save_steps, the steps between two checkpoints within a task",
    "eval_strategy": "every task is scored after each one",
    "remove_unused_columns": "the collator decides what the model receives",
    "resume_from_checkpoint": "run the same command again to go on",
    "do_train": "the driver always trains",
}

#: Arguments of `TrainingArguments` that the driver's training does not support → (the values that it accepts,
#: what to do instead).
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
    import_bitsandbytes()
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init}


def per_task(training: Mapping[str, Any], key: str, tasks: int) -> list[float]:
    """Return the values of an argument of `PER_TASK`: as listed, or one number repeated for all tasks."""
    value = training.get(key, PER_TASK[key][0])
    return [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)] * tasks


def check_training(
    tree: Mapping[str, Any], where: str = "training", recorded: bool = False
) -> dict[str, Any]:
    """Check names and types of `training` against `transformers.TrainingArguments`.

    Args:
        tree: its keys and values.
        where: the dotted key of the section, for error messages.
        recorded: whether a run recorded them after such a check; then `transformers`, which takes seconds to
            import, is not needed, and only the arguments that this package reads itself are checked.

    Returns:
        the arguments with values of the right types.

    Raises:
        ConfigError: naming the first argument that is unknown, unsupported, or has a wrong value.
    """
    hints = ARGUMENTS_READ if recorded else _argument_types()
    fields = {**hints, **dict.fromkeys(tree)} if recorded else hints
    checked = {}
    for key, value in tree.items():
        if key in DRIVER_ARGUMENTS:
            raise ConfigError(f"{where}.{key} is set by the driver", DRIVER_ARGUMENTS[key])
        if key not in fields:
            hint = nearest(str(key), fields)
            if not hint.startswith("did you mean"):
                hint = "https://huggingface.co/docs/transformers/main_classes/trainer lists them"
            raise ConfigError(f"{where}.{key} is not an argument of transformers.TrainingArguments", hint)
        if isinstance(value, (list, tuple)) and key in PER_TASK:
            checked[key] = [coerce_value(v, float, f"{where}.{key}") for v in value]
        else:
            checked[key] = coerce_value(value, hints[key], f"{where}.{key}") if key in hints else value
        if key in WITHOUT and checked[key] not in WITHOUT[key][0]:
            raise ConfigError(
                f"{where}.{key} is {value!r}, which the driver's training does not support", WITHOUT[key][1]
            )
    if checked.get("weight_decay", 0.0) < 0:
        raise ConfigError(
            f"{where}.weight_decay must not be negative (got {checked['weight_decay']})",
            "give a number of 0 or more",
        )
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if checked.get(key, 1) < 1:
            raise ConfigError(
                f"{where}.{key} must be at least 1 (got {checked[key]})",
                "give a whole number of 1 or more",
            )
    if isinstance(checked.get("deepspeed"), str):
        read_deepspeed(Path(checked["deepspeed"]), f"{where}.deepspeed")
    return checked


def read_deepspeed(path: Path, where: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Raises:
        ConfigError: if the file cannot be read, or is not a JSON object.
    """
    try:
        content = parse_json(decode_text(path.read_bytes()))
        # Raises ValueError for NaN and infinity, which JSON cannot represent.
        json.dumps(content, allow_nan=False)
    except (OSError, ValueError) as error:
        why = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{where} names '{path}', which {why}", "give the path of a DeepSpeed configuration in JSON"
        ) from error
    return as_mapping(content, where)
