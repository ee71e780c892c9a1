"""Configurations of new runs that begin with what somebody has: a checkpoint, or an adapter of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from llava_keeplora.adopt.peft_adapter import read_adapter, read_config
from llava_keeplora.adopt.source import ADAPTER, Source, find_source
from llava_keeplora.config import ModelConfig, RunConfig
from llava_keeplora.config.load import finish_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.models import DTYPES, open_model
from llava_keeplora.models.layouts import part_of


def new_run(
    model: str,
    task: str,
    into: str | Path,
    *,
    source: str | None = None,
    parts: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    data_root: str | None = None,
) -> RunConfig:
    """Return the configuration of a new run of KeepLoRA with one task.

    Args:
        model: the base, whose weights are what is protected: a Hub id or a folder.
        task: the task, by name or file.
        into: the run folder: new, empty, or that of the same run, which then goes on.
        source: what the task's update is adopted from; None if it is trained.
        parts: as in a configuration; the language part of a model that writes text, and every part of any
            other, when None.
        overrides: `a.b.c=value` strings.
        data_root: the folder with the data sets.

    Raises:
        ConfigError: a setting is wrong.
    """
    if parts is None:
        known = open_model(ModelConfig(name_or_path=model)).targets
        parts = {part: {} for part in (("language",) if "language" in known else known)}
    tree = {
        "tasks": [task],
        "model": {"name_or_path": model},
        "parts": {part: dict(settings) for part, settings in parts.items()},
        "adopted": [source] if source else [],
    }
    return finish_config(tree, overrides, data_root=data_root, output_dir=str(into))


def adopting_run(
    place: str,
    task: str,
    into: str | Path,
    *,
    base: str | None = None,
    overrides: Sequence[str] = (),
    data_root: str | None = None,
) -> RunConfig:
    """Return the configuration of a new run whose first task is an adapter or a merged checkpoint.

    The run adapts the layers that the adapter adapts, at its rank.

    Args:
        place: the adapter or checkpoint: a folder, or `user/name` on the Hub.
        task, into, overrides, data_root: see `new_run`.
        base: the base that it was trained on; the one that an adapter names when None.

    Raises:
        RunError: the source is damaged, or cannot be read exactly.
        ConfigError: no base is known, or see `new_run`.
    """
    source = find_source(place)
    config = read_config(source.folder) if source.form == ADAPTER else {}
    named = base or config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ConfigError(
            f"{source.folder} names no base model", "say which one it was trained on with --base"
        )
    folder = Path(place).expanduser()
    return new_run(
        named,
        task,
        into,
        source=str(folder.absolute()) if folder.is_dir() else place,
        parts=_adapted_parts(source, named, config) if config else None,
        overrides=overrides,
        data_root=data_root,
    )


def _adapted_parts(source: Source, base: str, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the parts that an adapter adapts, with its targets and rank."""
    model = ModelConfig(name_or_path=base)
    family = open_model(model)
    family.skeleton(DTYPES[model.dtype])
    linear = {name: layer for name, layer in family.model.named_modules() if isinstance(layer, nn.Linear)}
    parts: dict[str, dict[str, Any]] = {}
    for name, delta in read_adapter(source.folder, linear).items():
        if part := part_of(name, family.parts):
            settings = parts.setdefault(part, {"targets": set(), "rank": 1})
            settings["targets"].add(name.rsplit(".", 1)[-1])
            settings["rank"] = max(settings["rank"], len(delta.A))
    return {
        part: {
            "targets": sorted(settings["targets"]),
            "rank": settings["rank"],
            "alpha": settings["rank"] * config["lora_alpha"] / config["r"],
        }
        for part, settings in parts.items()
    }
