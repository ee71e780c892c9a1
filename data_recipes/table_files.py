"""TSV files, and JSON files with a list of records, read as tables."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from .csv_text import read_csv
from .errors import RecipeError
from .hub_layout import HubTable
from .json_files import read_json, read_rows, read_text
from .paths import data_root_of, images_folder, split_file
from .recipe import Recipe
from .records import Records
from .tables import from_table

#: The longest text that stands for another row's image rather than being one in base64, as in VLMEvalKit.
REFERENCE = 64


def read_table_file(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read a TSV file, a JSON list, JSONL, or a JSON object that holds one list of records.

    Images are paths in `source.images`; in a TSV file they are files in base64, as in MMBench's (a short text
    is the id of the row that has the image; github.com/open-compass/VLMEvalKit, docs/en/Development.md).

    Raises:
        RecipeError: the file is missing or malformed, or a record is.
    """
    path, folder = split_file(recipe, split, data_root), images_folder(recipe, split, data_root)
    named = recipe.source["columns"]
    if path.suffix.lower() == ".tsv":
        table = _read_tsv(path, named.get("image", "image"), named.get("id", "id"))
    else:
        table = _read_json(path, recipe, problems)
    return from_table(recipe, split, HubTable(table), folder, (data_root_of(recipe, data_root),), problems)


def _read_tsv(path: Path, image: str, row_id: str) -> datasets.Dataset:
    columns = read_csv(read_text(path), path.name, separator="\t").to_pydict()
    if image in columns:
        cells = columns[image]
        rows = dict(zip(columns.get(row_id, []), cells, strict=False))
        columns[image] = [_decoded(cell, rows, path.name, i) for i, cell in enumerate(cells, start=1)]
    features = datasets.Features(
        {
            name: datasets.Image(decode=False) if name == image else datasets.Value("string")
            for name in columns
        }
    )
    return datasets.Dataset.from_dict(columns, features=features)


def _decoded(cell: str, rows: Mapping[str, str], where: str, number: int) -> dict[str, Any] | None:
    if not cell:
        return None
    encoded = rows.get(cell, "") if len(cell) <= REFERENCE else cell
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if not content:
        raise RecipeError(
            f"row {number} of {where} has an image that is neither in base64 nor the id of a row with one",
            "replace the file",
        )
    return {"bytes": content, "path": None}


def _read_json(path: Path, recipe: Recipe, problems: list[RecipeError] | None) -> datasets.Dataset:
    """Return the columns that the recipe uses, so that others may hold values of several kinds."""
    rows = _rows(path, problems)
    source = recipe.source
    names = {"id", "image", "question", "hint", "answers"} | set(source["columns"].values())
    names |= {*source["options"], *source["meta"], *source["where"]}
    used = sorted(name for name in names if any(isinstance(row, dict) and name in row for row in rows))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise RecipeError(f"record {number} of {path.name} is not a JSON object", "correct the file")
    try:
        return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in used})
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise RecipeError(
            f"the values of a field of {path.name} have several kinds ({error})", "write values of one kind"
        ) from error


def _rows(path: Path, problems: list[RecipeError] | None) -> list[Any]:
    if path.suffix.lower() != ".json":
        return read_rows(path, problems)
    content = read_json(path, list | dict)
    if isinstance(content, list):
        return content
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    if len(lists) != 1:
        raise RecipeError(
            f"{path.name} holds an object with {len(lists)} lists, and one is the list of records",
            "keep that list alone",
        )
    return next(iter(lists.values()))
