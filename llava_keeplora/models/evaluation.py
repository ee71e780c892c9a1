"""A model of a family plug-in, for `llava-keeplora-eval`, which looks this function up when it needs one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_keeplora.config import EvaluationConfig, ModelConfig
from llava_keeplora.models import open_model
from llava_keeplora.models.base import Family
from llava_keeplora.registries import MODEL_FAMILIES


def open_family(
    name: str, path: str, revision: str | None, max_new_tokens: int, generation: Mapping[str, Any]
) -> tuple[Family, dict[str, Any]]:
    """Open a checkpoint with a family, without its weights.

    Args:
        name: the family's, as `model.family` of a run takes it.
        path: an embedded model's name, a folder or a Hub id.
        revision: on the Hub.
        max_new_tokens: where an answer is cut off at the latest.
        generation: settings of answers other than greedy ones.

    Returns:
        The family; and what it is, as plain data: its name without a path of this machine, and the hash of
        its sources.

    Raises:
        ConfigError: there is no such family or checkpoint, or it cannot follow a setting.
    """
    name = MODEL_FAMILIES.localize(name)
    evaluation = EvaluationConfig(max_new_tokens=max_new_tokens, generation=dict(generation))
    family = open_model(ModelConfig(path, revision, family=name), evaluation)
    return family, {"family": MODEL_FAMILIES.portable_name(name), "source": MODEL_FAMILIES.source_hash(name)}
