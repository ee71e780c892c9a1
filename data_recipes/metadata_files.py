"""`metadata.csv` and `metadata.jsonl` next to the images that they describe."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

import pyarrow

from .csv_text import read_csv
from .errors import RecipeError
from .json_tables import read_json_table
from .texts import is_blank

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
#: Columns that name files, and what datasets calls the column of their images: that before `_file_name`, or
#: `image` (https://huggingface.co/docs/datasets/image_dataset).
FILE_NAME = re.compile(r"(?:(.+)_)?file_name(s?)")


def read_metadata(text: str, where: str) -> pyarrow.Table:
    """Read the text of a metadata.csv or metadata.jsonl; a blank file name is none.

    Args:
        text: the content of the file.
        where: the file, for the error's sentence.

    Raises:
        RecipeError: see `read_csv` and `read_json_table`; or no column names files, a name is no text or
            leads out of the folder, or there is another column of the images' name.
    """
    table = read_csv(text, where) if where.endswith(".csv") else read_json_table(text, where, by_lines=True)
    naming = {name: found for name in table.column_names if (found := FILE_NAME.fullmatch(name))}
    if not naming:
        raise RecipeError(
            f"{where} has no column 'file_name' (it has {', '.join(map(repr, table.column_names[:5]))})",
            "name the column of the files so, and separate columns by commas",
        )
    for name, found in naming.items():
        images = (found[1] or "image") + found[2]
        if images in table.column_names:
            raise RecipeError(
                f"{where} has '{name}', whose images are called '{images}', and a column '{images}'",
                "keep one of them",
            )
        cells = table[name].to_pylist()
        for row, cell in enumerate(cells, start=1):
            for path in cell if isinstance(cell, list) else [cell]:
                _check_path(path, f"row {row} of {where}", name)
        kind = pyarrow.list_(pyarrow.string()) if found[2] else pyarrow.string()
        named = [[_or_none(path) for path in cell or []] if found[2] else _or_none(cell) for cell in cells]
        table = table.set_column(table.column_names.index(name), name, pyarrow.array(named, kind))
    return table


def _check_path(path: Any, what: str, column: str) -> None:
    if path is not None and not isinstance(path, str):
        raise RecipeError(f"{what} has {path!r} as its '{column}'", "write the path of a file as text")
    if path and ("://" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts):
        raise RecipeError(
            f"{what} has {path!r} as its '{column}', and paths start in the folder of that file",
            "write the path of a file there or in a folder below it",
        )


def _or_none(path: str | None) -> str | None:
    return None if path is None or is_blank(path) else path
