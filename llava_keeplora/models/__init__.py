"""Model families: load, name the linear layers by part, and put the model on a task."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from llava_keeplora.config import ModelConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.models.clip import ClipFamily, ClipTask

ASSETS = Path(__file__).parent.parent / "assets"
FAMILIES = {"clip": ClipFamily}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

__all__ = ["ASSETS", "FAMILIES", "ClipFamily", "ClipTask", "embedded_models", "load_model"]


def embedded_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.name for path in ASSETS.iterdir() if (path / "config.json").is_file())


def load_model(config: ModelConfig):
    """Load the model that a configuration names.

    Raises:
        ConfigError: for a model that is not there, or of a family that is not supported.
    """
    if config.dtype not in DTYPES:
        raise ConfigError(f"model.dtype is '{config.dtype}'", f"set it to one of {', '.join(DTYPES)}")
    path = str(ASSETS / config.name_or_path) if config.name_or_path in embedded_models() else config.name_or_path
    try:
        model_type = AutoConfig.from_pretrained(path, revision=config.revision).model_type
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the model '{config.name_or_path}' cannot be loaded ({str(error).splitlines()[0]})",
            f"give a local folder, a Hub id that this machine can reach, or an embedded model: {', '.join(embedded_models())}",
        ) from error
    if model_type not in FAMILIES:
        raise ConfigError(f"'{config.name_or_path}' is a '{model_type}' model", f"use a model of one of the families {', '.join(FAMILIES)}")
    return FAMILIES[model_type].load(path, config.revision, DTYPES[config.dtype])
