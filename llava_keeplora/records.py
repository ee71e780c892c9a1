"""The JSON files of a run folder.

One reader, with limits of size and depth, and what each file must hold for its readers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_keeplora.errors import RunError

RESTORE = "restore it or start over in a new output_dir"
#: Far above what a run writes: 100,000 logged steps take 15 MB, and nothing nests deeper than a dozen.
MOST_BYTES, MOST_DEEP = 256 << 20, 64


@dataclass(frozen=True)
class Each:
    """An object whose every value follows one schema."""

    of: Any


@dataclass(frozen=True)
class Number:
    """A number, no truth value; finite unless said otherwise.

    Args:
        least: the smallest allowed.
        finite: whether NaN and infinity are refused.
        whole: whether it is an integer.
    """

    least: float = -math.inf
    finite: bool = True
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        try:
            return not self.finite or (math.isfinite(value) and value >= self.least)
        except OverflowError:  # An integer of thousands of digits.
            return False

    def __str__(self) -> str:
        return "a count" if self.whole else "a number"


COUNT, NUMBER, ANY_NUMBER = Number(0, whole=True), Number(), Number(finite=False)


def read_object(path: Path, cure: str = RESTORE) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        path: the file.
        cure: what an error advises; by default for a run folder's.

    Raises:
        RunError: if it cannot be read, is larger or nested deeper than anything that a run writes, or holds
            something else.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
        if _is_deeper(content, MOST_DEEP):
            raise ValueError(f"it is nested deeper than {MOST_DEEP} levels")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error})", cure) from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no JSON object", cure)
    return content


def _is_deeper(content: Any, most: int) -> bool:
    level = [content]
    for _ in range(most):
        level = [
            below
            for value in level
            if isinstance(value, dict | list)
            for below in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return False
    return True


def mismatches(value: Any, schema: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Where a value differs from a schema: (dotted place, what it is and should be).

    Args:
        value: from JSON.
        schema: a type, `Number`, None, a tuple of alternatives, a list of one schema for each item, `Each`,
            or a dict of keys.
        where: the place of the value.
    """
    inside = f"{where}." if where else ""
    if isinstance(schema, Each | dict) and isinstance(value, dict):
        own = dict.fromkeys(value, schema.of) if isinstance(schema, Each) else schema
        for key, rule in own.items():
            name = key.removesuffix("?") if isinstance(schema, dict) else key
            if name in value:
                yield from mismatches(value[name], rule, f"{inside}{name[:80]}")
            elif name == key:
                yield f"{inside}{name}", "missing"
    elif isinstance(schema, list) and isinstance(value, list):
        for index, item in enumerate(value):
            yield from mismatches(item, schema[0], f"{where}[{index}]")
    elif not any(_fits(value, rule) for rule in (schema if isinstance(schema, tuple) else (schema,))):
        yield where, f"{_shown(value)} instead of {_named(schema)}"
    elif isinstance(schema, tuple) and isinstance(value, dict):
        yield from mismatches(value, next(rule for rule in schema if _fits(value, rule)), where)


def _fits(value: Any, rule: Any) -> bool:
    if isinstance(rule, Number):
        return value in rule
    if rule is None:
        return value is None
    return isinstance(value, rule if isinstance(rule, type) else list if isinstance(rule, list) else Mapping)


def _named(schema: Any) -> str:
    if isinstance(schema, tuple):
        return " or ".join(map(_named, schema))
    if schema is None or isinstance(schema, Number):
        return "null" if schema is None else str(schema)
    if isinstance(schema, type):
        return {str: "text", bool: "true or false", dict: "an object"}[schema]
    return "a list" if isinstance(schema, list) else "an object"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
