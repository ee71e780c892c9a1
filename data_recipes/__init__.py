"""What a task is: recipes, sequences of them, and the examples that they yield."""

from .errors import RecipeError, UserError
from .recipe import Recipe, list_recipes, load_recipe
from .sequence import Sequence, list_sequences, load_sequence
from .task_data import Example, TaskData

__all__ = [
    "Example",
    "Recipe",
    "RecipeError",
    "Sequence",
    "TaskData",
    "UserError",
    "list_recipes",
    "list_sequences",
    "load_recipe",
    "load_sequence",
]
