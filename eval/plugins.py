"""The plug-ins that a task uses: its metric and its reader."""

from __future__ import annotations

from pathlib import Path

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.metrics import METRICS, metric_source
from llava_keeplora_recipes import Recipe
from llava_keeplora_recipes.readers import READERS
from llava_keeplora_recipes.registry import PluginError
from llava_keeplora_recipes.strict_yaml import read_mapping


def task_plugins(recipe: Recipe) -> dict[str, str]:
    """Return the SHA-256 of the sources of the plug-ins that a task uses, under ``metric`` and ``reader``.

    No plug-in is executed.

    Raises:
        EvalError: a plug-in is not installed.
    """
    try:
        reader = READERS.source_hash(recipe.source["format"])
    except PluginError as error:
        raise EvalError(error.problem, error.cure) from error
    sources = {"metric": metric_source(recipe.metric), "reader": reader}
    return {role: source for role, source in sources.items() if source is not None}


def named_plugins(path: Path) -> list[tuple[str, str]]:
    """Return the plug-ins that a recipe's YAML file names, as (kind, name); none is searched for or executed.

    Raises:
        RecipeError: the file cannot be read.
    """
    facts = read_mapping(path)
    source = facts.get("source")
    references = (
        (METRICS, facts.get("metric")),
        (READERS, source.get("format") if isinstance(source, dict) else None),
    )
    return [
        (registry.kind, name)
        for registry, name in references
        if isinstance(name, str) and registry.is_plugin(name)
    ]
