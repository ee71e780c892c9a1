"""Reading of JSON and JSONL files, with errors that name the file and the line."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Any

from .errors import RecipeError, collect_errors
from .file_bytes import read_file
from .strict_json import constant_in, decode_text, may_hold_constants, parse_json


def read_rows(path: Path, problems: list[RecipeError] | None = None) -> list[Any]:
    """Read the records of a JSON file with a list, or of a JSONL file with one record per line.

    Args:
        path: the file; it is JSONL by its suffix, or if its first line is a whole object and others follow.
        problems: list that collects the errors of lines; they are raised when None.

    Raises:
        RecipeError: the file cannot be read, is no JSON, or has no list.
    """
    text = read_text(path)
    if path.suffix.lower() == ".jsonl" or _is_lines(text):
        lines = enumerate(text.split("\n"), start=1)
        return collect_errors(
            lambda item: _line(path, *item), [(n, line) for n, line in lines if line.strip()], problems
        )
    rows = _parsed(path, text, list)
    if not may_hold_constants(text):
        return rows
    return collect_errors(lambda item: _finite(*item, path), enumerate(rows), problems)


def _is_lines(text: str) -> bool:
    first, _, rest = text.strip().partition("\n")
    if not first.startswith("{") or not rest.lstrip().startswith("{"):
        return False
    try:
        return isinstance(parse_json(first), dict)
    except ValueError:
        return False


def read_json(path: Path, kind: type | UnionType) -> Any:
    """Read a JSON file whose outermost value has a type.

    Raises:
        RecipeError: the file cannot be read, is no JSON, or has another type.
    """
    # The standard library's reader, unlike datasets', keeps ids that are numbers in one record and text in
    # the next, and lets errors name the record.
    text = read_text(path)
    content = _parsed(path, text, kind)
    if may_hold_constants(text) and (constant := constant_in(content)) is not None:
        raise RecipeError(
            f"{path.name} holds {constant}, which is no value in JSON", "write null or a number there"
        )
    return content


def _parsed(path: Path, text: str, kind: type | UnionType) -> Any:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise RecipeError(f"{path} {error}", "correct the file") from error
    if not isinstance(content, kind):
        raise RecipeError(
            f"{path.name} holds a {type(content).__name__}, not a {getattr(kind, '__name__', kind)}",
            "correct the file",
        )
    return content


def _line(path: Path, number: int, line: str) -> Any:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise RecipeError(f"line {number} of {path.name} {error}", "correct the line") from error
    if may_hold_constants(line) and (constant := constant_in(row)) is not None:
        raise RecipeError(
            f"line {number} of {path.name} holds {constant}, which is no value in JSON",
            "write null or a number there",
        )
    return row


def _finite(number: int, row: Any, path: Path) -> Any:
    constant = constant_in(row)
    if constant is None:
        return row
    name = repr(row.get("id", number)) if isinstance(row, dict) else number
    raise RecipeError(
        f"record {name} of {path.name} holds {constant}, which is no value in JSON",
        "write null or a number there",
    )


def read_text(path: Path) -> str:
    """Read a text file; see `decode_text`.

    Raises:
        RecipeError: the file cannot be read, or is no text.
    """
    try:
        return decode_text(read_file(path))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error})", "correct the file") from error
    except ValueError as error:
        raise RecipeError(f"{path} {error}", "save the file as UTF-8") from error
