"""Checks that need several sections of a configuration at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_keeplora.config.coerce import as_mapping
from llava_keeplora.config.schema import RunConfig
from llava_keeplora.config.training_args import read_deepspeed
from llava_keeplora.errors import ConfigError
from llava_keeplora.registries import METHODS


def deepspeed_config(config: RunConfig) -> dict[str, Any] | None:
    """The ZeRO configuration of the run, its precision as it will be; None without one.

    Raises:
        ConfigError: if methods have different ones, or one contradicts `model.dtype` or `model.quantization`,
            or has no stage that there is.
    """
    named = {label: method.training.get("deepspeed") for label, method in config.methods.items()}
    if len({json.dumps(value, sort_keys=True) for value in named.values()}) > 1:
        told = " and ".join(f"{value!r} for '{label}'" for label, value in named.items())
        raise ConfigError(
            f"training.deepspeed is {told}, but the methods of a run share one model",
            "give all methods the same, or run them apart",
        )
    value = next(iter(named.values()), None)
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
            f"the DeepSpeed configuration has zero_optimization.stage {stage!r}", "set it to 0, 1, 2 or 3"
        )
    for precision, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        section = content.get(precision, {})
        if section.get("enabled") == "auto":
            section["enabled"] = all(
                method.training.get(precision) is True for method in config.methods.values()
            )
        # DeepSpeed turns the whole model into the precision of its own configuration, for good.
        if bool(section.get("enabled", False)) != (config.model.dtype == dtype):
            raise ConfigError(
                f"the DeepSpeed configuration has {precision}.enabled "
                f"{json.dumps(section.get('enabled', False))} and model.dtype is {config.model.dtype}",
                "make them agree: model.dtype bfloat16 with bf16 enabled, float32 with neither bf16 nor fp16",
            )
    if stage == 3 and config.model.quantization:
        raise ConfigError(
            "the DeepSpeed configuration has zero_optimization.stage 3 and model.quantization is "
            f"{config.model.quantization}, which it cannot split",
            "use stage 2, or leave the base unquantised",
        )
    if stage == 3:
        _check_zero3(config)
    return content


def check_full_finetuning(config: RunConfig) -> None:
    """Refuse to train a whole model whose weights are too coarse for it.

    Raises:
        ConfigError: for a method that would, on quantised weights or on half-precision ones without an
            optimiser's finer copies.
    """
    for label, method in config.methods.items():
        if METHODS[method.method].full_finetuning and config.model.quantization:
            raise ConfigError(
                f"'{label}' trains the whole model and model.quantization is {config.model.quantization}, "
                "but quantised weights can't be trained",
                f"leave the base unquantised, or '{label}' out of this run",
            )
        if (
            METHODS[method.method].full_finetuning
            and config.model.dtype != "float32"
            and not method.training.get("deepspeed")
        ):
            raise ConfigError(
                f"'{label}' trains the whole model and model.dtype is {config.model.dtype}, in which small "
                "steps are rounded away",
                "set model.dtype to float32; training.bf16 computes in bfloat16 all the same",
            )


def _check_zero3(config: RunConfig) -> None:
    for label, method in config.methods.items():
        if not METHODS[method.method].supports_zero3:
            raise ConfigError(
                f"the DeepSpeed configuration has zero_optimization.stage 3, and '{label}' ({method.method}) "
                "needs what it trains whole outside of its layers",
                "use stage 2",
            )
