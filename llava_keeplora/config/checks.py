"""Checks of a configuration that involve several sections at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_keeplora.coerce import as_mapping
from llava_keeplora.config.schema import MethodConfig, RunConfig
from llava_keeplora.config.training_args import read_deepspeed
from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.registries import METHODS
from llava_keeplora_recipes import load_recipe

if TYPE_CHECKING:
    from llava_keeplora.methods import Method


def deepspeed_config(config: RunConfig) -> dict[str, Any] | None:
    """Return the run's DeepSpeed configuration with `auto` precisions resolved; None without one.

    Raises:
        ConfigError: if methods have different ones, its stage does not exist, it contradicts `model.dtype` or
            `model.quantization`, or a method does not support ZeRO-3.
    """
    by_label = {label: method.training.get("deepspeed") for label, method in config.methods.items()}
    if len({json.dumps(value, sort_keys=True) for value in by_label.values()}) > 1:
        values = " and ".join(f"{value!r} for '{label}'" for label, value in by_label.items())
        raise ConfigError(
            f"training.deepspeed must be the same for all methods, which share one model (got {values})",
            "give all methods the same, or run them separately",
        )
    value = next(iter(by_label.values()), None)
    if not value:
        return None
    content = (
        read_deepspeed(Path(value), "training.deepspeed")
        if isinstance(value, str)
        else json.loads(json.dumps(value))
    )
    content = as_mapping(content, "training.deepspeed")
    content |= {
        key: as_mapping(content[key], f"training.deepspeed.{key}")
        for key in ("bf16", "fp16", "zero_optimization")
        if key in content
    }
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise ConfigError(
            f"zero_optimization.stage of the DeepSpeed configuration must be 0, 1, 2 or 3 (got {stage!r})",
            "set it to 0, 1, 2 or 3",
        )
    for precision, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        section = content.get(precision, {})
        if section.get("enabled") == "auto":
            section["enabled"] = all(
                method.training.get(precision) is True for method in config.methods.values()
            )
        # DeepSpeed converts the whole model permanently to the precision of its own configuration.
        if bool(section.get("enabled", False)) != (config.model.dtype == dtype):
            raise ConfigError(
                f"the DeepSpeed configuration has {precision}.enabled "
                f"{json.dumps(section.get('enabled', False))}, but model.dtype is {config.model.dtype}",
                "make them agree: model.dtype bfloat16 with bf16 enabled, float32 with neither bf16 nor fp16",
            )
    if stage == 3 and config.model.quantization:
        raise ConfigError(
            "the DeepSpeed configuration has zero_optimization.stage 3, which cannot shard the quantised "
            f"weights of model.quantization {config.model.quantization}",
            "use stage 2, or leave the base unquantised",
        )
    if stage == 3:
        _check_zero3(config)
    return content


def check_full_finetuning(config: RunConfig) -> None:
    """Check that methods that train the whole model have weights that are precise enough.

    Raises:
        ConfigError: for quantised weights, and for half-precision weights without fp32 copies in the
            optimiser, as DeepSpeed's has.
    """
    for label, method in config.methods.items():
        if METHODS[method.method].full_finetuning and config.model.quantization:
            raise ConfigError(
                f"'{label}' trains the whole model, but model.quantization is {config.model.quantization}, "
                "and quantised weights can't be trained",
                f"leave the base unquantised, or '{label}' out of this run",
            )
        if (
            METHODS[method.method].full_finetuning
            and config.model.dtype != "float32"
            and not method.training.get("deepspeed")
        ):
            raise ConfigError(
                f"'{label}' trains the whole model, but model.dtype is {config.model.dtype}, in which small "
                "updates are rounded away",
                "set model.dtype to float32; training.bf16 computes in bfloat16 all the same",
            )


def check_adopting(config: RunConfig) -> None:
    """Check that every method can take over the tasks that the run adopts.

    Raises:
        ConfigError: naming the method, the task and the methods that can.
    """
    task = next((task for task, source in zip(config.tasks, config.adopted) if source), None)
    for label, method in config.methods.items() if task else ():
        if not make_method(method).adopts:
            takers = ", ".join(name for name, cls in METHODS.items() if cls.adopts)
            raise ConfigError(
                f"'{label}' cannot take over task '{load_recipe(task).name}', which was trained elsewhere",
                f"adopt it into a run of {takers} alone",
            )


def check_tasks(config: RunConfig) -> None:
    """Check that every method can follow its settings in all tasks of the run.

    Raises:
        ConfigError: naming the method's setting and the task.
    """
    for label, method in config.methods.items():
        try:
            make_method(method).check_tasks(len(config.tasks))
        except MethodError as error:
            raise ConfigError(f"methods.{label}.{error.problem}", error.cure) from None


def make_method(method: MethodConfig) -> Method:
    """Return a method with its settings, on which what it can do depends."""
    cls = METHODS[method.method]
    return cls(cls.Options(**method.options))


def _check_zero3(config: RunConfig) -> None:
    for label, method in config.methods.items():
        if not (instance := make_method(method)).supports_zero3:
            raise ConfigError(
                f"the DeepSpeed configuration has zero_optimization.stage 3, but '{label}' ({method.method}) "
                f"{instance.zero3_conflict}",
                "use stage 2",
            )


def check_own_optimizer(config: RunConfig) -> None:
    """Check that methods with an optimiser of their own get neither DeepSpeed nor another optimiser.

    Raises:
        ConfigError: naming the method and the setting.
    """
    for label, method in config.methods.items():
        instance = make_method(method)
        if not instance.own_optimizer:
            continue
        option, value = instance.default_optimizer or ("", "")
        setting = f"set methods.{label}.{option} to {value}" if option else ""
        if method.training.get("deepspeed"):
            raise ConfigError(
                f"'{label}' ({method.method}) has an optimiser of its own, which needs whole matrices, but "
                "training.deepspeed is set",
                f"train without DeepSpeed, {setting and f'{setting}, which takes ZeRO-1 and 2, '}"
                f"or leave '{label}' out of this run",
            )
        optim = str(method.training.get("optim", "adamw_torch"))
        if not optim.startswith("adamw_torch"):
            raise ConfigError(
                f"'{label}' ({method.method}) has an optimiser of its own, which is AdamW with other steps, "
                f"but training.optim is {optim}",
                f"remove it, {setting and f'{setting}, '}"
                f"or set methods.{label}.training.optim to adamw_torch",
            )
