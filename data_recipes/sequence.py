"""Sequences: the tasks that a model learns, in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .errors import RecipeError
from .strict_yaml import check_keys, list_shipped, read_mapping, resolve

SEQUENCES = Path(__file__).parent / "sequences"
KEYS: dict[str, tuple[type, str]] = {
    "name": (str, "text"),
    "description": (str, "text"),
    "tasks": (list, "a list"),
    "epochs": (list, "a list"),
    "not_scored": (dict, "a mapping"),
}


@dataclass(frozen=True)
class Sequence:
    """Tasks in the order in which they are learned.

    Attributes:
        name: the sequence's name.
        tasks: recipe names, or absolute paths of users' recipes.
        epochs: epochs per task; None leaves them to the run's configuration.
        description: one sentence on the purpose of the sequence.
        not_scored: task of the published order that is left out → why it cannot be scored.
    """

    name: str
    tasks: list[str]
    epochs: list[int] | None = None
    description: str = ""
    not_scored: dict[str, str] = field(default_factory=dict)


def list_sequences() -> list[str]:
    """Return the names of the sequences that come with the package, sorted."""
    return list_shipped(SEQUENCES)


def load_sequence(name_or_path: str | Path) -> Sequence:
    """Load a sequence that comes with the package, or a user's own YAML.

    Args:
        name_or_path: a name from `list_sequences()`, or the path of a `.yaml` file, in which
            recipe paths are relative to that file.

    Raises:
        RecipeError: there is no such sequence, or the file is not valid.
    """
    path, shipped = resolve(name_or_path, SEQUENCES, "sequence")
    facts = read_mapping(path)
    check_keys(facts, KEYS, path)
    for key in ("name", "tasks"):
        if key not in facts:
            raise RecipeError(f"{path.name} lacks the key '{key}'", f"add '{key}:' to {path}")
    tasks, epochs = facts["tasks"], facts.get("epochs")
    if not tasks or not all(isinstance(t, str) for t in tasks):
        raise RecipeError(f"{path.name} has no list of recipe names under 'tasks'", f"list them in {path}")
    for task in tasks:
        if tasks.count(task) > 1:
            raise RecipeError(
                f"{path.name} lists the task '{task}' twice", "a task is learned once; remove one of them"
            )
    if epochs is not None and (
        len(epochs) != len(tasks) or not all(type(e) is int and e > 0 for e in epochs)
    ):
        raise RecipeError(
            f"{path.name} gives the epochs {epochs} for {len(tasks)} tasks",
            "give one whole number above zero per task",
        )
    for task, reason in facts.get("not_scored", {}).items():
        if not isinstance(task, str) or not isinstance(reason, str):
            raise RecipeError(
                f"{path.name} has no reason in text for '{task}' under 'not_scored'",
                "write why it cannot be scored",
            )
    if not shipped:
        facts["tasks"] = [
            str((path.parent / t).absolute()) if t.endswith((".yaml", ".yml")) else t for t in tasks
        ]
    return Sequence(**facts)
