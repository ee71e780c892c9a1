"""CSV files as tables whose cells are text, as it is written."""

from __future__ import annotations

import csv
import io

import pyarrow

from .errors import RecipeError


def read_csv(
    text: str, where: str, separator: str = ",", names: list[str] | None = None, has_header: bool = True
) -> pyarrow.Table:
    """Read the text of a CSV file (RFC 4180); every cell is text.

    Args:
        text: the content of the file.
        where: the file, for errors.
        separator: the character between cells.
        names: names of the columns; those of the first row when None.
        has_header: whether the first row names the columns.

    Raises:
        RecipeError: the file is no CSV, has no rows, a repeated column, or a row of another length than the
            header.
    """
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except (TypeError, csv.Error) as error:
        raise RecipeError(f"{where} cannot be read as CSV ({error})", "correct the file") from error
    finally:
        csv.field_size_limit(limit)  # a setting of the process
    rows = [line for line in lines if line]
    header = rows.pop(0) if has_header and rows else []
    header = header if names is None else names
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise RecipeError(f"{where} has the column '{twice[0]}' more than once", "keep one of them")
    if not rows:
        raise RecipeError(f"{where} has no rows", "add a row for each example, or remove the file")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise RecipeError(
                f"row {number} of {where} has {len(row)} cells and the header has {len(header)}",
                "put quotes around cells that hold commas",
            )
    columns: dict[str, list[str]] = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return pyarrow.table(columns)
