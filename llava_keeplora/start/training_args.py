"""The `transformers.TrainingArguments` of one task, and their check before any training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from llava_keeplora.distributed import has_group
from llava_keeplora.errors import ConfigError, nearest
from llava_keeplora.steps import optimiser_steps

#: Trackers for which transformers does not look for an installed package.
ALWAYS = {"azure_ml", "flyte"}


def training_arguments(
    training: Mapping[str, Any], *, output_dir: str, run_name: str, seed: int
) -> TrainingArguments:
    """Return the `TrainingArguments` of one task: the user's, and those that the driver sets.

    Args:
        training: the task's `training` section.
        output_dir: folder for files that the Trainer itself writes.
        run_name: name of this task's training in trackers.
        seed: seed of this task's training.
    """
    values = {
        "logging_steps": 10,
        "save_steps": 100,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        # Batches are collated from memory; pinning would only copy them once more.
        "dataloader_pin_memory": False,
        # Every trainable tensor gets a gradient; the first step checks that.
        "ddp_find_unused_parameters": False,
        **training,
        "run_name": run_name,
    }
    return TrainingArguments(
        output_dir=output_dir,
        seed=seed,
        data_seed=seed,
        save_strategy="steps",
        eval_strategy="no",
        remove_unused_columns=False,
        **values,
    )


def planned_arguments(training: Mapping[str, Any], world: int) -> TrainingArguments:
    """Return `TrainingArguments` for a check, also outside of DeepSpeed's processes, as in a plan.

    Args:
        training: as for `training_arguments`.
        world: number of processes.
    """
    places = {"output_dir": "unset", "run_name": "unset", "seed": 0}
    deepspeed = training.get("deepspeed")
    if not deepspeed or has_group():
        return training_arguments(training, **places)
    arguments = training_arguments({**training, "deepspeed": None}, **places)
    # A copy, because transformers fills in its `auto` values.
    arguments.hf_deepspeed_config = HfTrainerDeepSpeedConfig(copy.deepcopy(deepspeed))
    arguments.hf_deepspeed_config.trainer_config_process(SimpleNamespace(**vars(arguments), world_size=world))
    arguments.deepspeed = deepspeed
    return arguments


def check_arguments(
    make: Callable[[], TrainingArguments],
    label: str,
    training: Mapping[str, Any],
    task: str,
    examples: int,
    world: int,
) -> None:
    """Check the arguments by transformers' own rules, and refuse those that would have no or a wrong effect.

    Args:
        make: returns the arguments.
        label: the method's label.
        training: the `training` section that they are made from.
        task: the task's name.
        examples: number of its training examples.
        world: number of processes.

    Raises:
        ConfigError: naming the argument.
    """
    try:
        arguments = make()
    except (ValueError, TypeError, ImportError, AssertionError, OSError, NotImplementedError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"transformers refuses the training arguments of '{label}' ({why})", "correct `training`"
        ) from error
    steps = optimiser_steps(training, examples, world)
    if not arguments.deepspeed:  # DeepSpeed creates the optimiser itself.
        _check_optimiser(arguments, label, steps)
    _check_loader(arguments, label, task, examples, world)
    check_reporters(arguments)
    if arguments.tf32:
        raise ConfigError(
            "training.tf32 is true, which would round the sums that determine the subspaces to ten bits",
            "leave it out, and use bf16",
        )
    if (arguments.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        key = next(
            key
            for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
            if training.get(key)
        )
        raise ConfigError(
            f"training.{key}.use_reentrant is true, but re-entrant checkpointing gives no gradients to a "
            "block whose input requires none, such as the first of a frozen model",
            "leave it out",
        )
    mismatches = _deepspeed_mismatches(arguments, task, steps) if arguments.deepspeed else []
    if mismatches:
        pairs = "; ".join(
            line.removeprefix("- ds ").replace(" vs hf ", " against training.") for line in mismatches
        )
        raise ConfigError(
            f"the DeepSpeed configuration contradicts the run's ({pairs})",
            'make them agree, or write "auto" in the DeepSpeed configuration',
        )


def _check_optimiser(arguments: TrainingArguments, label: str, steps: int) -> None:
    """Create the optimiser and its schedule once, so that settings which they refuse are reported early.

    Raises:
        ConfigError: naming the optimiser, with its message.
    """
    try:
        cls, values = Trainer.get_optimizer_cls_and_kwargs(arguments)
        unread = [
            pair.partition("=")[0]
            for pair in (arguments.optim_args or "").replace(" ", "").split(",")
            if pair and not _reads(arguments, pair)
        ]
        if unread:
            raise ValueError(f"it does not read training.optim_args.{unread[0]}")
        if {"params", "model", "optimizer_dict"} & set(values):
            return  # It can be created only for the model's own layers.
        optimiser = cls([torch.nn.Parameter(torch.zeros(1))], **values)
        get_scheduler(
            arguments.lr_scheduler_type,
            optimiser,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    except Exception as error:  # Optimisers of other libraries may raise any kind of error.
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"the optimiser '{getattr(arguments.optim, 'value', arguments.optim)}' of '{label}' or its "
            "schedule "
            f"'{getattr(arguments.lr_scheduler_type, 'value', arguments.lr_scheduler_type)}' refuses its "
            f"settings ({why})",
            "correct `training`",
        ) from error


def check_reporters(arguments: TrainingArguments) -> None:
    """Check that all trackers are installed; transformers would refuse only after the zero-shot row.

    Raises:
        ConfigError: naming the first one that transformers doesn't know or whose package is missing.
    """
    for name in arguments.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"training.report_to names '{name}', which transformers does not know",
                nearest(name, INTEGRATION_TO_CALLBACK),
            )
        if name not in {*get_available_reporting_integrations(), *ALWAYS}:
            raise ConfigError(
                f"training.report_to names '{name}', whose package is not installed",
                f"pip install {name.replace('_', '-')}, or leave it out",
            )


def _reads(arguments: TrainingArguments, pair: str) -> bool:
    """Return whether transformers uses a `key=value` of `optim_args` for this optimiser.

    It does if another value of the key changes the optimiser's arguments or fails.
    """

    def outcome(optim_args: str | None) -> Any:
        changed = copy.copy(arguments)
        changed.optim_args = optim_args
        try:
            return Trainer.get_optimizer_cls_and_kwargs(changed)
        except Exception:  # Optimisers of other libraries may raise any kind of error.
            return None

    return outcome(f"{pair.partition('=')[0]}=0.123") != outcome(None)


def _check_loader(arguments: TrainingArguments, label: str, task: str, examples: int, world: int) -> None:
    """Check the data loader's workers by torch's own rules, and that `drop_last` leaves at least one batch.

    Raises:
        ConfigError: naming the argument.
    """
    workers = {
        "num_workers": arguments.dataloader_num_workers,
        "persistent_workers": arguments.dataloader_persistent_workers,
        "prefetch_factor": arguments.dataloader_prefetch_factor,
    }
    try:
        torch.utils.data.DataLoader(range(examples), **workers)
    except ValueError as error:
        raise ConfigError(
            f"torch refuses the data loader of '{label}' ({str(error).rstrip('.')})", "correct `training`"
        ) from error
    size = arguments.per_device_train_batch_size * world
    if arguments.dataloader_drop_last and examples < size:
        raise ConfigError(
            f"training.dataloader_drop_last is true, but '{task}' has only {examples} examples for batches "
            f"of {size}",
            "use smaller batches, or leave it out",
        )


def _deepspeed_mismatches(arguments: TrainingArguments, task: str, steps: int) -> list[str]:
    """Return where the DeepSpeed configuration contradicts the arguments, in transformers' words.

    This includes the numbers of steps, which transformers compares only when training begins.
    """
    # A copy, so that no `auto` value is filled in.
    compared = copy.deepcopy(arguments.hf_deepspeed_config)
    compared.fill_match("scheduler.params.total_num_steps", steps, f"steps of '{task}'")
    compared.fill_match(
        "scheduler.params.warmup_num_steps",
        max(1, arguments.get_warmup_steps(steps)),
        f"warmup_steps of '{task}'",
    )
    return compared.mismatches
