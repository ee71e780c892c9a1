"""Tasks whose data are `datasets.Dataset` objects that a Python program holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from .errors import RecipeError
from .hub_layout import HubTable
from .recipe import Recipe
from .records import Records
from .tables import from_table

CURE = (
    "give columns image and label (a class), image, question and answers, or messages; or say which are "
    "meant, as in {'train': dataset, 'kind': 'vqa', 'metric': 'exact_match', 'columns': {'question': "
    "'query'}}"
)
#: What a recipe says where the caller does not: CLIP's caption of a class, and exact answers.
CLASSIFICATION = {"kind": "classification", "metric": "accuracy", "prompt": "a photo of a {c}."}
QUESTIONS = {"kind": "vqa", "metric": "exact_match"}


def read_dataset(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read a split from the `datasets.Dataset` in `recipe.tables`, by the columns of `tables.from_table`.

    Raises:
        RecipeError: the recipe has no such table here, or a column is missing.
    """
    if split not in recipe.tables:
        raise RecipeError(
            f"the data of '{recipe.name}' are datasets.Dataset objects of a Python program, and its split "
            f"'{split}' is not given here",
            f"go on in Python, with Run.open(FOLDER, datasets={{'{recipe.name}': dataset}})",
        )
    anywhere = Path(Path.cwd().anchor)  # Paths of images in a caller's own table are the caller's choice.
    return from_table(recipe, split, HubTable(recipe.tables[split]), None, (anywhere,), problems)


def split_given(name: str, given: Any) -> tuple[dict[str, datasets.Dataset], dict[str, Any]]:
    """Return the tables of a task by split, and the keys of its recipe, of what a caller gives for a task.

    Args:
        name: the task's name.
        given: a `Dataset`, the split `train`; a `DatasetDict`; or a mapping that has keys of a recipe
            (`prompt`, `metric`, `columns`, ...; see docs/data.md) next to the splits.

    Raises:
        RecipeError: it holds no tables, or one that cannot be read again.
    """
    entries = given if isinstance(given, Mapping) else {"train": given}
    tables = {key: value for key, value in entries.items() if isinstance(value, datasets.Dataset)}
    facts = {key: value for key, value in entries.items() if key not in tables}
    streams = (datasets.IterableDataset, datasets.IterableDatasetDict)
    if any(isinstance(value, streams) for value in (given, *entries.values())):
        raise RecipeError(
            f"the dataset '{name}' is a stream, and a task's examples are read in several passes, by index",
            "load it with streaming=False",
        )
    if not tables:
        raise RecipeError(
            f"the dataset '{name}' is a {type(given).__name__} without tables, and a task's data are "
            "datasets.Dataset objects",
            "give a Dataset, a DatasetDict, or {'train': dataset, 'test': dataset}",
        )
    for split, table in tables.items():
        if table.format["type"] == "custom":
            raise RecipeError(
                f"the dataset '{name}' has a transform on its split '{split}', which a run's record cannot "
                "hold",
                "apply it with .map(), or take it off with .with_format(None)",
            )
    return tables, facts


def recipe_facts(
    name: str, tables: Mapping[str, datasets.Dataset], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a recipe's keys for tables: the caller's, and what the columns of the training data say.

    A column `label` makes a classification task, whose classes are the names of its `ClassLabel`; `question`,
    or `messages`, makes questions with answers.

    Args:
        name: the task's name.
        tables: split → its table.
        facts: keys of the recipe that the caller gives; with `extends`, nothing is taken from the columns.

    Raises:
        RecipeError: the columns are none that a task can have.
    """
    table = tables.get("train", next(iter(tables.values())))
    names, columns = table.column_names, dict(facts.get("columns", {}))
    if "messages" in names and not {"label", "question"} & {*names}:
        columns.setdefault("messages", "messages")
    if "answer" in names and "answers" not in names and "messages" not in columns:
        columns.setdefault("answers", "answer")
    common: dict[str, Any] = {"name": name, "version": 1}
    if "extends" not in facts:
        common |= _kind_of(name, table, columns, facts) | {"licence": table.info.license or "unknown"}
    source = {"format": "dataset"} | ({"columns": columns} if columns else {})
    given = {key: value for key, value in facts.items() if key != "columns"}
    return common | given | {"source": source, "splits": {split: split for split in tables}}


def _kind_of(
    name: str, table: datasets.Dataset, columns: Mapping[str, str], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return kind, metric, prompt and classes, as far as the caller leaves them out."""
    label, names = columns.get("label", "label"), table.column_names
    if "messages" in columns or columns.get("question", "question") in names:
        kind = facts.get("kind", "vqa")
    elif label in names:
        kind = facts.get("kind", "classification")
    elif "kind" in facts:
        kind = facts["kind"]
    else:
        raise RecipeError(
            f"the dataset '{name}' has the columns {', '.join(names)}, of which none says what is to be "
            "learned",
            CURE,
        )
    if kind != "classification":
        return QUESTIONS if kind == "vqa" else {}
    named = label in names and isinstance(table.features[label], datasets.ClassLabel)
    return CLASSIFICATION | {"classes": list(table.features[label].names) if named else "from-source"}
