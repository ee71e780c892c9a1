"""Model families: load, name the linear layers by part, and put the model on a task."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from llava_keeplora.config import ModelConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.models.base import Family, Inputs, Prepared, TaskModel
from llava_keeplora.models.clip import ClipFamily, ClipTask
from llava_keeplora.models.llava import LlavaFamily, LlavaTask
from llava_keeplora.models.on_task import recomputes
from llava_keeplora_eval.llava import LLAVA_MODELS

ASSETS = Path(__file__).parent.parent / "assets"
FAMILIES = ("clip", *LLAVA_MODELS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

__all__ = [
    "ASSETS", "DTYPES", "FAMILIES", "ClipFamily", "ClipTask", "Family", "Inputs", "LlavaFamily", "LlavaTask", "Prepared", "TaskModel", "embedded_models", "load_model", "open_model",
    "recomputes",
]


def embedded_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.name for path in ASSETS.iterdir() if (path / "config.json").is_file())


def load_model(model: ModelConfig, max_new_tokens: int = 128) -> Family:
    """The model that a configuration names, with its weights; see `open_model`."""
    family = open_model(model, max_new_tokens)
    family.load(DTYPES[model.dtype])
    return family


def _place(model: ModelConfig) -> str:
    """A folder or a Hub id."""
    return str(ASSETS / model.name_or_path) if model.name_or_path in embedded_models() else model.name_or_path


def weights_stamp(model: ModelConfig) -> list[tuple[str, int, int]] | str | None:
    """What changes when the weights behind a name do, without reading them: a folder's files with sizes and times, or the Hub's commit."""
    path = Path(_place(model))
    if path.is_dir():
        return sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in path.iterdir() if file.is_file())
    return getattr(AutoConfig.from_pretrained(model.name_or_path, revision=model.revision), "_commit_hash", None)


def open_model(model: ModelConfig, max_new_tokens: int = 128) -> Family:
    """The model that a configuration names, without its weights yet.

    Args:
        model: which one.
        max_new_tokens: where an answer of a LLaVA model is cut off at the latest.

    Raises:
        ConfigError: for a model that is not there, or of a family that is not supported.
    """
    if model.dtype not in DTYPES:
        raise ConfigError(f"model.dtype is '{model.dtype}'", f"set it to one of {', '.join(DTYPES)}")
    path = _place(model)
    try:
        model_type = AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=False).model_type
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the model '{model.name_or_path}' cannot be loaded ({str(error).splitlines()[0]})",
            f"give a local folder, a Hub id that this machine can reach, or an embedded model: {', '.join(embedded_models())}",
        ) from error
    if model_type == "clip":
        return ClipFamily(path, model.revision, model.quantization)
    if model_type in LLAVA_MODELS:
        return LlavaFamily(path, model.revision, model.max_length, max_new_tokens, model.quantization)
    raise ConfigError(f"'{model.name_or_path}' is a '{model_type}' model", f"use a model of one of the families {', '.join(FAMILIES)}")
