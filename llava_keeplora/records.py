"""Reading of JSON files with limits of size and depth, and their comparison with a schema."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_keeplora.errors import RunError

RESTORE = "restore it or start over in a new output_dir"
#: Limits in bytes and levels, far above what a run writes: 100,000 logged steps take 15 MB, and the deepest
#: record has a dozen levels.
MOST_BYTES, MOST_DEEP = 256 << 20, 64


@dataclass(frozen=True)
class Each:
    """Schema of an object all of whose values follow the same schema."""

    of: Any


@dataclass(frozen=True)
class Number:
    """Schema of a number; booleans are not numbers.

    Args:
        least: the smallest allowed value.
        finite: whether NaN and infinity are refused, and `least` is checked.
        whole: whether it must be an integer.
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
    """Read a JSON file that holds an object.

    Args:
        path: the file.
        cure: the advice of an error; by default that for a file of a run folder.

    Raises:
        RunError: if it cannot be read, exceeds the limits of size or depth, or does not hold an object.
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
    """Yield where a value differs from a schema: (dotted place, what it is and what it should be).

    Args:
        value: a value read from JSON.
        schema: a type, `Number`, None, a tuple of alternatives, a list with one schema for all items, `Each`,
            or a dict of keys, of which those that end in `?` are optional.
        where: the place of the value.
    """
    inside = f"{where}." if where else ""
    if isinstance(schema, Each | dict) and isinstance(value, dict):
        rules = dict.fromkeys(value, schema.of) if isinstance(schema, Each) else schema
        for key, rule in rules.items():
            name = key.removesuffix("?") if isinstance(schema, dict) else key
            if name in value:
                yield from mismatches(value[name], rule, f"{inside}{name[:80]}")
            elif name == key:
                yield f"{inside}{name}", "missing"
    elif isinstance(schema, list) and isinstance(value, list):
        for index, item in enumerate(value):
            yield from mismatches(item, schema[0], f"{where}[{index}]")
    elif not any(_fits(value, rule) for rule in (schema if isinstance(schema, tuple) else (schema,))):
        yield where, f"{_abbreviate(value)} instead of {_describe(schema)}"
    elif isinstance(schema, tuple) and isinstance(value, dict):
        yield from mismatches(value, next(rule for rule in schema if _fits(value, rule)), where)


def _fits(value: Any, rule: Any) -> bool:
    if isinstance(rule, Number):
        return value in rule
    if rule is None:
        return value is None
    return isinstance(value, rule if isinstance(rule, type) else list if isinstance(rule, list) else Mapping)


def _describe(schema: Any) -> str:
    if isinstance(schema, tuple):
        return " or ".join(map(_describe, schema))
    if schema is None or isinstance(schema, Number):
        return "null" if schema is None else str(schema)
    if isinstance(schema, type):
        return {str: "text", bool: "true or false", dict: "an object"}[schema]
    return "a list" if isinstance(schema, list) else "an object"


def _abbreviate(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
