"""Reading JSON and JSONL, with errors that name the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import RecipeError, sift
from .places import told


def read_rows(path: Path, problems: list[RecipeError] | None = None) -> list[Any]:
    """The records of a JSON file that holds a list, or of a JSONL file with one record per line.

    Args:
        path: the file; its ending says which of the two it is.
        problems: collects lines that are no JSON; None raises.

    Raises:
        RecipeError: the file cannot be read, is no JSON, or holds something else than a list.
    """
    if path.suffix == ".jsonl":
        lines = enumerate(read_text(path).split("\n"), start=1)
        return sift(lambda item: _line(path, *item), [(n, line) for n, line in lines if line.strip()], problems)
    return read_json(path, list)


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose outermost value is of a type.

    Raises:
        RecipeError: the file cannot be read, is no JSON, or holds something else.
    """
    # the standard library's reader, not datasets': it keeps ids that are numbers in one record and
    # text in the next, and lets an error name the record
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path} is not readable JSON ({error})", "correct the file") from error
    if not isinstance(content, kind):
        raise RecipeError(
            f"{path.name} holds a {type(content).__name__}, not a {kind.__name__}", "correct the file"
        )
    return content


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise RecipeError(f"line {number} of {path.name} is not readable JSON ({error})", "correct the line") from error


def read_text(path: Path) -> str:
    """A file as text in UTF-8.

    Raises:
        RecipeError: the file cannot be read, or is something else.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} cannot be read ({told(error)})", "correct the file") from error
