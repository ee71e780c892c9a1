"""Model families: load, name the linear layers by part, and put the model on a task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llava_keeplora.config import EvaluationConfig, ModelConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.models.base import Crops, Family, Images, Inputs, Prepared
from llava_keeplora.models.clip import ClipFamily
from llava_keeplora.models.clip_task import ClipTask
from llava_keeplora.models.crops import RandomCrops
from llava_keeplora.models.given import GivenModel
from llava_keeplora.models.llava import LlavaFamily, LlavaTask
from llava_keeplora.models.task_model import MixedTask, TaskModel, recomputes
from llava_keeplora.models.usage import Usage
from llava_keeplora.models.workload import Work, repeated
from llava_keeplora.registries import MODEL_FAMILIES
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.hub import check_reachable
from llava_keeplora_eval.models import FAMILIES, model_family, resolve_model
from llava_keeplora_recipes.registry import PluginError

ASSETS = Path(__file__).parent.parent / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

__all__ = [
    "ASSETS",
    "DTYPES",
    "FAMILIES",
    "MODEL_FAMILIES",
    "ClipFamily",
    "ClipTask",
    "Crops",
    "Family",
    "GivenModel",
    "Images",
    "Inputs",
    "LlavaFamily",
    "LlavaTask",
    "MixedTask",
    "Prepared",
    "RandomCrops",
    "TaskModel",
    "Usage",
    "Work",
    "embedded_models",
    "load_model",
    "open_model",
    "recomputes",
    "repeated",
]


def embedded_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.name for path in ASSETS.iterdir() if (path / "config.json").is_file())


def load_model(model: ModelConfig, evaluation: EvaluationConfig = EvaluationConfig()) -> Family:
    """Return the model that a configuration names, with its weights; see `open_model`."""
    family = open_model(model, evaluation)
    family.load(DTYPES[model.dtype])
    return family


def open_model(
    model: ModelConfig, evaluation: EvaluationConfig = EvaluationConfig(), given: GivenModel | None = None
) -> Family:
    """Return the model that a configuration names, without its weights yet.

    Args:
        model: which one.
        evaluation: how a LLaVA model answers.
        given: the model in memory that the configuration describes.

    Raises:
        ConfigError: for a model that is not there, or of a family that is not supported.
    """
    if model.dtype not in DTYPES:
        raise ConfigError(f"model.dtype is '{model.dtype}'", f"set it to one of {', '.join(DTYPES)}")
    if given is not None:
        return _open_given(model, evaluation, given)
    model.check_place()
    with _as_config_error():
        path = resolve_model(model.name_or_path)
        if model.family:
            check_reachable(path, model.revision)
        name = model.family or model_family(model.name_or_path, model.revision)
        return MODEL_FAMILIES[name].from_config(path, model, evaluation)


def _open_given(model: ModelConfig, evaluation: EvaluationConfig, given: GivenModel) -> Family:
    kind = getattr(given.model.config, "model_type", None)
    name = model.family or FAMILIES.get(kind)
    if name is None:
        raise ConfigError(
            f"the given model is a '{kind}', and supported are the types {', '.join(FAMILIES)}",
            "give a model of one of these, or name the family that it is like by model.family",
        )
    family = MODEL_FAMILIES[name]
    if not issubclass(family, (ClipFamily, LlavaFamily)):
        raise ConfigError(
            f"model.family is '{name}', which loads checkpoints itself, and a model object is given",
            "name the checkpoint under model.name_or_path",
        )
    with _as_config_error():
        return family.from_config(model.name_or_path, model, evaluation, given)


@contextmanager
def _as_config_error() -> Iterator[None]:
    try:
        yield
    except (EvalError, PluginError) as error:
        raise ConfigError(error.problem, error.cure) from error
