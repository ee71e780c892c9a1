"""What the metadata of a parquet file says, without reading its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from .errors import RecipeError

#: Under which files without rows are counted.
WITHOUT_ROWS = "without rows"
#: Rows that datasets reads at once, where it cannot take the number of a file's first row group: it is zero.
BATCH_SIZE = 256


def count_rows(file: str | Path) -> int | None:
    """Return the number of rows of a parquet file; None where it is none, which is reported on reading it."""
    try:
        return pyarrow.parquet.read_metadata(file).num_rows
    except (OSError, ValueError, pyarrow.ArrowException):
        return None


def begins_without_rows(file: str | Path) -> bool:
    """Return whether the first row group of a parquet file has no rows."""
    try:
        metadata = pyarrow.parquet.read_metadata(file)
        return metadata.num_row_groups > 0 and metadata.row_group(0).num_rows == 0
    except (OSError, ValueError, pyarrow.ArrowException):
        return False


def refuse_mixed_booleans(files: Sequence[Path]) -> None:
    """Refuse a column that is boolean in one file and text in another, where it would be `true` or `false`.

    Raises:
        RecipeError: a column is; it names both files.
    """
    first: dict[str, tuple[bool, Path]] = {}
    for file in files:
        try:
            schema = pyarrow.parquet.read_schema(file)
        except (OSError, ValueError, pyarrow.ArrowException):
            continue  # reported on reading it
        for column in schema:
            boolean, other = first.setdefault(column.name, (pyarrow.types.is_boolean(column.type), file))
            if boolean != pyarrow.types.is_boolean(column.type):
                raise RecipeError(
                    f"the column '{column.name}' is boolean in one of '{other}' and '{file}' alone",
                    "write the files with one type",
                )
