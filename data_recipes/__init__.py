"""Tasks as data: recipes, sequences of tasks, and their examples; imported as ``llava_keeplora_recipes``."""

import importlib

#: Public name → its module, imported when the name is first used, so that `--help` is quick.
_MODULES = {
    "Example": "task_data",
    "Message": "records",
    "Reader": "readers",
    "Recipe": "recipe",
    "Records": "records",
    "RecipeError": "errors",
    "Sequence": "sequence",
    "TaskData": "task_data",
    "UserError": "errors",
    "inspect_split": "loading",
    "list_recipes": "recipe_files",
    "list_sequences": "sequence",
    "load_recipe": "recipe_files",
    "load_recipes": "recipe_files",
    "load_sequence": "sequence",
    "load_split": "loading",
}

__all__ = [
    "Example",
    "Message",
    "Reader",
    "Recipe",
    "RecipeError",
    "Records",
    "Sequence",
    "TaskData",
    "UserError",
    "inspect_split",
    "list_recipes",
    "list_sequences",
    "load_recipe",
    "load_recipes",
    "load_sequence",
    "load_split",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
