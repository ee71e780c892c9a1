"""Comparison of a task's recipe and plug-ins with those that a run was planned with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_keeplora.errors import RunError, UserError
from llava_keeplora.journal import Journal
from llava_keeplora.run_folder import PLAN
from llava_keeplora_eval.plugins import task_plugins
from llava_keeplora_recipes import load_recipe


def planned_tasks(journal: Journal) -> Sequence[Mapping[str, Any]]:
    """Return the records of the tasks that the journal's last plan has, in order."""
    plans = [entry for entry in journal.entries if (entry.task, entry.stage) == PLAN]
    return plans[-1].info.get("tasks", ()) if plans else ()


def recipe_changes(source: str, record: Mapping[str, Any], method: Path) -> Iterator[UserError]:
    """Yield an error if a recipe, its metric or its reader is not what a method was planned with.

    Recipes that take their classes from the data are not compared, as this would read the data. No plug-in is
    executed.

    Args:
        source: name or file of the recipe.
        record: the task's record in the plan.
        method: the method's folder.
    """
    try:
        recipe = load_recipe(source)
        plugins = task_plugins(recipe)
    except UserError as error:
        yield error
        return
    if recipe.classes is not None and recipe.fingerprint != record.get("recipe_fingerprint"):
        yield RunError(
            f"{source} is not the recipe of '{recipe.name}' that {method} was planned with", "restore it"
        )
    changed = [role for role, found in plugins.items() if found != record.get("plugins", {}).get(role)]
    if changed:
        yield RunError(
            f"the {changed[0]} of '{recipe.name}' is not what {method} was planned with", "restore its files"
        )
