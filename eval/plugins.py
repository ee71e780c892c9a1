"""What a task takes from plug-ins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_keeplora_eval.metrics import metric_source

if TYPE_CHECKING:
    from llava_keeplora_recipes import Recipe


def task_plugins(recipe: Recipe) -> dict[str, str]:
    """Return the SHA-256 of the sources of the plug-ins that a task uses, under ``metric``; empty where there are none.

    Nothing of a plug-in is executed.

    Raises:
        EvalError: one of them is not installed.
    """
    sources = {"metric": metric_source(recipe.metric)}
    return {role: source for role, source in sources.items() if source is not None}
