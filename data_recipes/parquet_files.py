"""What the metadata of a parquet file says, without reading its rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet

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
