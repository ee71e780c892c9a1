"""Loading of recipes from YAML: those of the package, users' own, and the recipes that they extend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import RecipeError, nearest
from .readers import KINDS, READERS
from .recipe import METRIC_NAMES, Recipe
from .recipe_rules import FROM_SOURCE, KEYS, REQUIRED, check_recipe
from .rendered import RENDERED
from .rendered_scenes import SCENES
from .strict_yaml import check_keys, dump_yaml, list_shipped, read_mapping, resolve

RECIPES = Path(__file__).parent / "recipes"


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package, sorted."""
    return list_shipped(RECIPES)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load a recipe that comes with the package, or a user's own YAML.

    A user's YAML may have `extends: NAME` and only the keys that differ from that recipe.

    Args:
        name_or_path: a name from `list_recipes()`, or the path of a `.yaml` file.

    Raises:
        RecipeError: there is no such recipe, or the file is not valid.
    """
    path, shipped = resolve(name_or_path, RECIPES, "recipe")
    facts = _read(path, seen=())
    facts = _with_rendered(facts, path)
    missing = [k for k in REQUIRED if k not in facts]
    if missing:
        raise RecipeError(f"{path.name} lacks the key '{missing[0]}'", f"add '{missing[0]}:' to {path}")
    check_recipe(facts, path)
    if facts.get("classes") == FROM_SOURCE:
        facts["classes"] = None
    return Recipe(**facts, folder=None if shipped else path.parent.absolute())


def load_recipes(names_or_paths: Sequence[str | Path]) -> list[Recipe]:
    """Load the recipes of a sequence's tasks.

    Raises:
        RecipeError: a recipe is missing or not valid, or two have the same name.
    """
    recipes = [load_recipe(task) for task in names_or_paths]
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(
                f"task '{name}' is in the sequence {names.count(name)} times", "name each task once"
            )
    return recipes


def flat_recipe(path: str | Path) -> str:
    """Return a user's recipe as YAML that needs no other file, with the keys of the recipes that it extends.

    Args:
        path: the `.yaml` file.

    Raises:
        RecipeError: there is no such file, or it is not valid.
    """
    return dump_yaml(_read(resolve(path, RECIPES, "recipe")[0], seen=()))


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Read a YAML file's keys on top of those of the recipe that it extends."""
    facts = read_mapping(path)
    check_keys(facts, KEYS, path)
    if "metric" in facts:
        facts["metric"] = METRIC_NAMES.localize(facts["metric"], path.parent)
    if isinstance(facts.get("source", {}).get("format"), str):
        facts["source"] = facts["source"] | {
            "format": READERS.localize(facts["source"]["format"], path.parent)
        }
    parent = facts.pop("extends", None)
    if parent is None:
        return facts
    if path in seen:
        raise RecipeError(f"{path.name} extends itself", f"remove 'extends' from {path}")
    parent_path, _ = resolve(parent, RECIPES, "recipe", start=path.parent)
    return _read(parent_path, (*seen, path)) | facts


def _with_rendered(facts: dict[str, Any], path: Path) -> dict[str, Any]:
    """Add version, prompt, classes and splits of a rendered task, which the code that draws it defines."""
    source = facts.get("source", {})
    if source.get("format") != "rendered":
        return facts
    task = source.get("task")
    spec = (SCENES.get(task) or RENDERED.get(task)) if isinstance(task, str) else None
    if spec is None:
        raise RecipeError(
            f"{path.name} names the rendered task '{task}', which does not exist",
            nearest(str(task), [*RENDERED, *SCENES]),
        )
    kind = spec.kind if task in SCENES else "classification"
    if facts.get("kind") in KINDS and facts["kind"] != kind:
        raise RecipeError(
            f"{path.name} is of the kind {facts['kind']}, and the rendered task '{task}' is {kind}",
            f"write 'kind: {kind}' in {path}",
        )
    if "classes" in facts and kind == "classification":
        raise RecipeError(
            f"{path.name} lists classes for a rendered task, which has its own",
            f"remove 'classes' from {path}",
        )
    for stream in facts.get("splits", {}).values():
        if not isinstance(stream, str) or stream not in spec.sizes:
            raise RecipeError(
                f"{path.name} names the split '{stream}', which '{task}' does not have",
                nearest(str(stream), spec.sizes),
            )
    drawn = {
        "version": spec.version,
        "splits": {s: s for s in spec.sizes},
        "expected_sizes": dict(spec.sizes),
    }
    if kind == "classification":
        drawn |= {"prompt": spec.prompt, "classes": list(spec.classes)}
    elif kind == "captioning":
        drawn["prompt"] = spec.instruction
    return drawn | facts
