"""Conversion of plain data into frozen records; unknown keys and values of a wrong type are errors."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from llava_keeplora.errors import ConfigError, UserError, nearest

#: YAML 1.1's words for true and false, which are read as such for fields that accept no text.
SWITCHES = {"yes": True, "on": True, "no": False, "off": False}


def build(kind: type, tree: Mapping[str, Any], where: str, also: tuple[str, ...] = ()) -> Any:
    """Build a dataclass from a mapping.

    Args:
        kind: the dataclass.
        tree: its values; missing ones take the default.
        where: the dotted key of the mapping, for error messages.
        also: names to suggest in addition to the fields, if a key is unknown.

    Raises:
        ConfigError: for an unknown key, or a value of a wrong type or range.
    """
    check_keys(kind, tree, where, also)
    values = coerce_fields(kind, tree, where)
    try:
        return kind(**values)
    except UserError as error:
        raise ConfigError(f"{where}{'.' if where else ''}{error.problem}", error.cure) from None


def coerce_fields(kind: type, tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of a dataclass's fields, converted to their types; arguments as `build`.

    Raises:
        ConfigError: for a value of a wrong type, or of a wrong range in a section.
    """
    hints, prefix, values = typing.get_type_hints(kind), f"{where}." if where else "", {}
    for key, value in tree.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = build(hint, as_mapping(value, f"{prefix}{key}"), f"{prefix}{key}")
        else:
            values[key] = coerce_value(value, hint, f"{prefix}{key}")
    return values


def check_keys(kind: type, tree: Mapping[str, Any], where: str, also: tuple[str, ...] = ()) -> None:
    """Check that all keys are fields of a dataclass; see `build`.

    Raises:
        ConfigError: naming the first key that is not, with the nearest field.
    """
    fields = {f.name for f in dataclasses.fields(kind)}
    for key in tree:
        if key not in fields:
            raise ConfigError(
                f"unknown key '{where}{'.' if where else ''}{key}'", nearest(str(key), fields | set(also))
            )


def coerce_value(value: Any, hint: Any, where: str) -> Any:
    """Convert a YAML scalar to a field's type.

    Raises:
        ConfigError: if the value does not fit the type, or is a number that is not finite.
    """
    options = [h for h in typing.get_args(hint) if h is not type(None)] if _is_union(hint) else [hint]
    if value is None and (_is_union(hint) and type(None) in typing.get_args(hint)):
        return None
    # YAML has no tuples: what a record keeps as one is written as a list.
    names = " or ".join(getattr(o, "__name__", str(o)).replace("tuple", "list") for o in options)
    for option in options:
        origin = typing.get_origin(option) or option
        try:
            if origin is bool and isinstance(value, bool):
                return value
            # For a field that accepts text as well, `no` is text: `save_strategy: no`.
            if origin is bool and str not in options and isinstance(value, str) and value.lower() in SWITCHES:
                return SWITCHES[value.lower()]
            if (
                origin is int
                and not isinstance(value, bool)
                and (isinstance(value, int) or (isinstance(value, str) and value.lstrip("-").isdigit()))
            ):
                return int(value)
            if (
                origin is float
                and not isinstance(value, bool)
                and isinstance(value, (int, float, str))
                and math.isfinite(float(value))
            ):
                return float(value)
            if origin is str and isinstance(value, str):
                return value
            if origin is tuple and isinstance(value, (list, tuple)):
                return tuple(value)
            if origin in (list, dict) and isinstance(value, origin):
                return value
        except (ValueError, OverflowError):
            continue
    if all((typing.get_origin(o) or o) in (bool, int, float, str, tuple, list, dict) for o in options):
        raise ConfigError(f"{where} is {value!r}, but it takes {names}", "correct the value")
    return value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def as_mapping(value: Any, where: str) -> dict[str, Any]:
    """Return a section of a configuration as a dict; an empty one for None.

    Raises:
        ConfigError: if it is not a mapping.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}, but it takes `key: value` pairs", "correct the value")
    return dict(value)
