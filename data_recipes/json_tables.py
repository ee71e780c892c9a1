"""JSON and JSONL files as tables, with values as they are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import pyarrow

from .errors import RecipeError
from .strict_json import constant_in, may_hold_constants, parse_json
from .texts import as_text

TEXT = pyarrow.string()


def read_json_table(text: str, where: str, by_lines: bool, field: str | None = None) -> pyarrow.Table:
    """Read JSON with a list of objects or an object of columns, or JSONL with an object per line.

    A column with text in some rows and numbers or booleans in others becomes text, see `as_text`.

    Args:
        text: the content of the file.
        where: the file, for errors.
        by_lines: whether the file is JSONL; a file that is no JSON as a whole is read as JSONL, too.
        field: key of the list in an object; None if the list is not in one.

    Raises:
        RecipeError: the file is no such JSON, has no rows, or values of a column have different kinds.
    """
    rows = _rows_of_lines(text, where) if by_lines and field is None else _rows(text, where, field)
    if not rows:
        raise RecipeError(f"{where} has no rows", "add one for each example, or remove the file")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise RecipeError(f"row {number} of {where} is no object", "correct the row")
    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.table({name: _column([row.get(name) for row in rows], name, where) for name in names})


def as_written(table: pyarrow.Table, features: Mapping[str, Any] | None, where: str) -> pyarrow.Table:
    """Return a table of which columns that are text in an earlier file are text too, see `as_text`.

    Args:
        table: of a later file.
        features: of the earlier file; None for the first.
        where: the file, for the error's sentence.
    """
    for index, name in enumerate(table.column_names):
        if (features or {}).get(name) == datasets.Value("string") and table.schema.types[index] != TEXT:
            values = table[name].to_pylist()
            texts = [None if value is None else as_text(value, where, f"'{name}'") for value in values]
            table = table.set_column(index, name, pyarrow.array(texts, TEXT))
    return table


def _rows(text: str, where: str, field: str | None) -> list[Any]:
    try:
        content = _parsed(text, where)
    except RecipeError:
        if field is None and len(text.strip().split("\n")) > 1 and text.lstrip().startswith("{"):
            return _rows_of_lines(text, where)
        raise
    if field is not None:
        content = content.get(field) if isinstance(content, dict) else None
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise RecipeError(f"{where} holds no list of objects", "correct the file")
    if not content or not all(isinstance(cells, list) for cells in content.values()):
        return [content]
    if len({len(cells) for cells in content.values()}) > 1:
        raise RecipeError(f"{where} has columns of different lengths", "correct the file")
    return [dict(zip(content, cells, strict=True)) for cells in zip(*content.values(), strict=True)]


def _rows_of_lines(text: str, where: str) -> list[Any]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [_parsed(line, f"line {number} of {where}") for number, line in lines]


def _parsed(text: str, where: str) -> Any:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise RecipeError(f"{where} {error}", "correct the file") from error
    if may_hold_constants(text) and (constant := constant_in(content)) is not None:
        raise RecipeError(
            f"{where} holds {constant}, which is no value in JSON", "write null or a number there"
        )
    return content


def _column(values: list[Any], name: str, where: str) -> pyarrow.Array:
    try:
        return pyarrow.array(values)
    except (ValueError, TypeError, OverflowError, pyarrow.ArrowException) as error:
        # text in one record and a number in the next, or a number of more than 64 bits
        if all(value is None or isinstance(value, str | int | float) for value in values):
            texts = [None if value is None else as_text(value, where, f"'{name}'") for value in values]
            return pyarrow.array(texts, TEXT)
        raise RecipeError(
            f"the values of '{name}' in {where} have several kinds ({type(error).__name__}: {error})",
            "write values of one kind, for instance lists alone",
        ) from error
